//! The command that lists and prints GPU kernels.

#![allow(clippy::unwrap_used)] // the helpers of tests are tests too

mod common;

use common::Place;
use serde_json::Value;

/// Names of the kernels that a list holds.
fn names(list: &Value) -> Vec<&str> {
    list["kernels"].as_array().unwrap().iter().map(|kernel| kernel["name"].as_str().unwrap()).collect()
}

#[test]
fn every_listed_kernel_prints() {
    let place = Place::new();
    for target in ["sm_75", "sm_80"] {
        let list = place.json(&format!("ptx --list --json --target {target}"));
        assert_eq!(list["target"], target);
        let since = |kernel: &Value| kernel["minimum_target"].as_str().unwrap().to_owned();
        assert!(list["kernels"].as_array().unwrap().iter().all(|kernel| *since(kernel) <= *target));
        // One of each kind is enough: the library's own tests build all of them.
        for kind in ["attention_f16_full", "attention_bf16_int8", "quantize_k", "query_means", "combine"] {
            let names = names(&list);
            let name = names.iter().find(|name| name.starts_with(kind)).unwrap();
            let ptx = place.succeed(&format!("ptx {name} --target {target}"));
            assert!(ptx.starts_with(".version 6.") || ptx.starts_with(".version 7."), "{name}: {ptx:.80}");
            let named = ptx.contains(&format!(".visible .entry {name}(\n"));
            assert!(named && ptx.contains(&format!("\n.target {target}\n")), "{name}: {ptx:.80}");
            assert!(ptx.ends_with("    ret;\n}\n"), "{name}");
        }
    }
}

#[test]
fn lists_know_their_target() {
    let place = Place::new();
    let (ampere, ada) =
        (place.json("ptx --list --json --target sm_86"), place.json("ptx --list --json --target sm_89"));
    // Reading a cache of FP8 values takes no FP8 instruction.
    let fp8 = |list: &Value| {
        names(list).iter().filter(|name| name.contains("fp8") && !name.starts_with("cache_attend")).count()
    };
    assert_eq!(fp8(&ampere), 0);
    assert!(fp8(&ada) > 10);
    let all = place.json("ptx --list --json");
    assert_eq!(all["target"], Value::Null);
    assert!(names(&ada).iter().all(|name| names(&all).contains(name)));
    let text = place.succeed("ptx --list --target sm_89");
    let first = names(&ada)[0];
    assert!(text.lines().nth(2).unwrap().starts_with(&format!("  {first} ")), "{text:.400}");
    assert!(text.ends_with(&format!("\n{} kernels\n", names(&ada).len())));
}

#[test]
fn a_kernel_prints_for_the_target_asked_for() {
    let place = Place::new();
    let report = place.json("ptx combine_f16_d64 --target sm_120 --json");
    assert_eq!((&report["target"], &report["kernel"]["minimum_target"]), (&"sm_120".into(), &"sm_75".into()));
    assert_eq!(report["kernel"]["description"], "merges parts of split keys; f16, head_dim 64");
    let ptx = report["ptx"].as_str().unwrap();
    assert!(ptx.starts_with(".version 8.7\n.target sm_120\n"), "{ptx:.80}");
    assert_eq!(place.succeed("ptx combine_f16_d64 --target sm_120"), ptx);
}

#[test]
fn bad_calls() {
    let place = Place::new();
    let ada = place.json("ptx --list --json --target sm_89");
    let fp8 = *names(&ada).iter().find(|name| name.starts_with("quantize_v_e4m3")).unwrap();
    let lacking = format!("ptx {fp8} --target sm_80");
    // The message of `Unsupported`, which names the instruction as PTX has it.
    let output = place.run(&lacking);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        message.starts_with(&format!(
            "error: {fp8}: target is sm_80, expected sm_89 for `cvt.rn.satfinite.e4m3x2.f32 "
        )),
        "{message}"
    );
    assert_eq!(message.lines().count(), 1);

    let target = |found: &str| {
        format!(
            "invalid value '{found}' for '--target <SM>': target: value is `{found}`, expected sm_75 to \
             sm_121, such as sm_89 or sm_90a (see --help)"
        )
    };
    let rows: Vec<(&str, i32, String)> = vec![
        (
            "ptx combine_f16_d65",
            2,
            "KERNEL: value is `combine_f16_d65`, expected a kernel of `sageattn ptx --list`; closest: \
             combine_f16_d64, combine_bf16_d64, combine_f16_d256"
                .into(),
        ),
        ("ptx", 2, "the following required arguments were not provided: <KERNEL> (see --help)".into()),
        (
            "ptx combine_f16_d64 --list",
            2,
            "the argument '[KERNEL]' cannot be used with '--list' (see --help)".into(),
        ),
        ("ptx --list --target sm_85", 2, target("sm_85")),
    ];
    for (words, code, line) in rows {
        let output = place.run(words);
        let found = (output.status.code(), String::from_utf8(output.stderr).unwrap());
        assert_eq!(found, (Some(code), format!("error: {line}\n")), "sageattn {words}");
    }
}

/// Times are predicted for GPUs that are not there, and are within what such a prediction can be of those measured.
#[test]
fn times_of_gpus_are_predicted() {
    let place = Place::new();
    let predicted = |gpu: &str, rest: &str| {
        let document = place.json(&format!(
            "explain --heads 24 --seq 17776 --head-dim 128 --dtype bf16 --gpu {gpu} --json {rest}"
        ));
        let times = document["predictions"].as_array().expect("a list").clone();
        times.iter().map(|found| found["predicted_ms"].as_f64().expect("a time")).collect::<Vec<f64>>()
    };
    // On an H200: full precision 5.68 ms, INT8 scores 4.84, with FP8 values 3.65 to 4.03 (docs/performance/hopper.md).
    let hopper = predicted("h200", "");
    for (found, measured) in hopper.iter().zip([5.68, 4.84, 3.84]) {
        assert!((found / measured - 1.0).abs() < 0.1, "{hopper:?}");
    }
    // Half of the pairs with a causal mask: a little more, as tiles on the diagonal count whole.
    for (causal, all) in predicted("h200", "--causal").iter().zip(&hopper) {
        assert!((0.5..0.56).contains(&(causal / all)), "{causal} of {all}");
    }
    // A GPU that is half as fast at everything that counts takes twice as long.
    let (laptop, desktop) = (predicted("jetson-orin", "")[0], predicted("rtx-4090", "")[0]);
    assert!(laptop > 2.0 * desktop, "{laptop} {desktop}");
}

#[test]
fn predictions_say_what_they_are_and_what_they_cannot_do() {
    let place = Place::new();
    let text = place.succeed("explain --heads 2 --seq 512 --head-dim 64 --gpu rtx-4090");
    for part in [
        "Predicted for rtx-4090",
        "planned",
        "Nothing was measured",
        "128 multiprocessors",
        "FP8 summed in f16",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    for (arguments, wanted) in [
        ("--gpu rtx-9090", "gpu: value is `rtx-9090`, expected one of t4, rtx-2080-ti, a100"),
        ("--gpu h200 --target sm_90a", "cannot be used with"),
        ("--gpu h200 --padding 5", "a predicted time with a mask is not supported"),
    ] {
        let output = place.run(&format!("explain {arguments}"));
        let refused = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && refused.contains(wanted), "{arguments}: {refused}");
    }
}
