//! The commands about GPU kernels: listing and printing them, and running them in the emulator.

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
    let list = place.json("ptx --list --json --target sm_80");
    assert_eq!(list["target"], "sm_80");
    assert!(list["kernels"].as_array().unwrap().iter().all(|kernel| kernel["minimum_target"] == "sm_80"));
    // One of each kind is enough: the library's own tests build all of them.
    for kind in ["attention_f16_full", "attention_bf16_int8", "quantize_k", "query_means", "combine"] {
        let names = names(&list);
        let name = names.iter().find(|name| name.starts_with(kind)).unwrap();
        let ptx = place.succeed(&format!("ptx {name}"));
        assert!(ptx.starts_with(".version 7."), "{name}: {ptx:.80}");
        assert!(ptx.contains("\n.target sm_80\n") && ptx.contains(&format!(".visible .entry {name}(\n")));
        assert!(ptx.ends_with("    ret;\n}\n"), "{name}");
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
    assert_eq!((&report["target"], &report["kernel"]["minimum_target"]), (&"sm_120".into(), &"sm_80".into()));
    assert_eq!(report["kernel"]["description"], "merges parts of split keys; f16, head_dim 64");
    let ptx = report["ptx"].as_str().unwrap();
    assert!(ptx.starts_with(".version 8.7\n.target sm_120\n"), "{ptx:.80}");
    assert_eq!(place.succeed("ptx combine_f16_d64 --target sm_120"), ptx);
}

#[test]
fn emulation_agrees_with_the_oracle() {
    let place = Place::new();
    for (words, scheme, kernels, exact) in [
        ("--head-dim 64 --causal", "INT8 QK per-thread · smooth K (of 128 rows) · FP16 PV (f32)", 3, 0.03),
        (
            "--dtype bf16 --q-len 70 --kv-len 90 --head-dim 40",
            "INT8 QK per-thread · smooth K (of 128 rows) · BF16 PV (f32)",
            3,
            0.03,
        ),
        ("--scheme full --target sm_80 --heads 4 --kv-heads 2", "full QK · FP16 PV (f32)", 1, 0.002),
        ("--q-len 1 --kv-len 600", "full QK · FP16 PV (f32)", 2, 0.002),
        (
            "--scheme sage2-int8-fp8-per-thread --q-len 65",
            "INT8 QK per-thread · smooth K · FP8 PV (448, f32+f32)",
            3,
            0.08,
        ),
    ] {
        let report = place.json(&format!("emulate --json {words}"));
        assert_eq!(report["scheme"], scheme, "{words}");
        let launches = report["kernels"].as_array().unwrap();
        assert_eq!(launches.len(), kernels, "{words}: {launches:?}");
        for launch in launches {
            let total = launch["instructions_total"].as_u64().unwrap();
            let of_kinds = launch["instructions"].as_object().unwrap().values();
            assert_eq!(of_kinds.map(|count| count.as_u64().unwrap()).sum::<u64>(), total);
            assert!(launch["sectors"].as_u64().unwrap() > 0 && launch["ms"].as_f64().unwrap() > 0.0);
            assert!(launch["bank_conflicts"].is_u64() && launch["grid"][0].as_u64().unwrap() > 0);
        }
        // About twice what was seen; the library's own tests are strict.
        let of_scheme = report["against_scheme"]["relative_l1"].as_f64().unwrap();
        let of_exact = report["against_exact"]["relative_l1"].as_f64().unwrap();
        assert!(of_scheme < 0.02 && of_exact < exact, "{words}: {of_scheme}, {of_exact}");
    }
}

#[test]
fn emulation_reads_well() {
    let text = Place::new().succeed("emulate --q-len 1 --kv-len 600 --causal");
    let first = "Emulated sm_89 · f16, 2 query heads, 2 key heads, 1 queries × 600 keys, head_dim 64, causal";
    assert_eq!(text.lines().next(), Some(first));
    for words in [
        "\nbecause full precision: 1 query rows",
        "\nbecause keys in 2 parts",
        "\ncombine_f16_d64: grid 1×1×1, blocks of 128×1×1 threads\n",
        "    mma.m16n8k16.f32.f16 ",
        "  bank conflicts ",
        "  sectors of global memory ",
        "  the scheme's definition  ",
        "  exact attention          ",
        "\nNo fault found; emulated in ",
    ] {
        assert!(text.contains(words), "`{words}` not in\n{text}");
    }
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
            "invalid value '{found}' for '--target <SM>': target: value is `{found}`, expected sm_75 to sm_121, such as sm_89 or sm_90a (see --help)"
        )
    };
    let rows: Vec<(&str, i32, String)> = vec![
        (
            "ptx combine_f16_d65",
            2,
            "KERNEL: value is `combine_f16_d65`, expected a kernel of `sageattn ptx --list`; closest: combine_f16_d64, combine_bf16_d64, combine_f16_d256".into(),
        ),
        (
            "ptx",
            2,
            "the following required arguments were not provided: <KERNEL> (see --help)".into(),
        ),
        (
            "ptx combine_f16_d64 --list",
            2,
            "the argument '[KERNEL]' cannot be used with '--list' (see --help)".into(),
        ),
        ("ptx --list --target sm_85", 2, target("sm_85")),
        ("ptx --list --target sm_75", 1, "target: value is sm_75, expected sm_80 or later".into()),
        ("emulate --target ada", 2, target("ada")),
        (
            "emulate --dtype f32",
            2,
            "invalid value 'f32' for '--dtype <DTYPE>' [possible values: f16, bf16] (see --help)".into(),
        ),
        (
            "emulate --head-dim 257",
            2,
            "invalid value '257' for '--head-dim <N>': 257 is not in 1..=256 (see --help)".into(),
        ),
        (
            "emulate --q-len 0",
            2,
            "invalid value '0' for '--q-len <N>': 0 is not in 1..=65536 (see --help)".into(),
        ),
        (
            "emulate --heads 8 --kv-heads 3",
            1,
            "k: shape is [1, 3, 128, 64], expected a number of heads that divides q's 8".into(),
        ),
        (
            "emulate --scheme sage2-int8-fp8-per-thread --target sm_86",
            1,
            "FP8 P·V on sm_86 is not supported: FP8 needs sm_89 or later; use FP16 P·V; the nearest that this GPU computes is \
             `sage2-int8-fp16-per-thread`, INT8 QK per-thread · smooth K · FP16 PV (f32)"
                .into(),
        ),
        (
            "emulate --heads 4096 --q-len 65536",
            1,
            "a buffer of 34359738368 bytes is not supported: the emulator's have at most 4294967296".into(),
        ),
        (
            "emulate --scheme sage3-nvfp4",
            1,
            "scheme with NVFP4 scores is not supported: no GPU kernel computes it yet; the nearest that this GPU computes is \
             `sage2-int8-fp8-per-thread`, INT8 QK per-thread · smooth K · FP8 PV (448, f32+f32)"
                .into(),
        ),
    ];
    for (words, code, line) in rows {
        let output = place.run(words);
        let found = (output.status.code(), String::from_utf8(output.stderr).unwrap());
        assert_eq!(found, (Some(code), format!("error: {line}\n")), "sageattn {words}");
    }
}
