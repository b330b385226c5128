//! The commands that plan and run a GPU's passes without one.

#![allow(clippy::unwrap_used)] // the helpers of tests are tests too

mod common;

use common::Place;
use serde_json::Value;

/// Runs `emulate` and checks what every report holds: how far the output, and the log-sum-exp where there is one, are
/// from the definition, which is about twice what was seen, as the kernels' own tests are strict.
fn emulated(place: &Place, words: &str, exact: f64) -> Value {
    let report = place.json(&format!("emulate --json {words}"));
    for launch in report["launches"].as_array().unwrap() {
        let total = launch["instructions_total"].as_u64().unwrap();
        let of_kinds = launch["instructions"].as_object().unwrap().values();
        assert_eq!(of_kinds.map(|count| count.as_u64().unwrap()).sum::<u64>(), total);
        assert!(launch["sectors"].as_u64().unwrap() > 0 && launch["ms"].as_f64().unwrap() > 0.0);
        assert!(launch["bank_conflicts"].is_u64() && launch["grid"][0].as_u64().unwrap() > 0);
    }
    let number = |value: &Value, name: &str| value[name].as_f64().unwrap_or(f64::NAN);
    let of_scheme = number(&report["against_scheme"], "relative_l1");
    let of_exact = number(&report["against_exact"], "relative_l1");
    assert!(of_scheme < 0.02 && of_exact < exact, "{words}: {of_scheme}, {of_exact}");
    assert_eq!(report["lse"].is_object(), words.contains("--lse"), "{words}");
    if report["lse"].is_object() {
        let of_scheme = number(&report["lse"]["against_scheme"], "max_abs_error");
        let of_exact = number(&report["lse"]["against_exact"], "max_abs_error");
        assert!(of_scheme < 2e-3 && of_exact < 0.1, "{words}: lse {of_scheme}, {of_exact}");
    }
    report
}

/// How many launches a report has.
fn launches(report: &Value) -> usize {
    report["launches"].as_array().unwrap().len()
}

#[test]
fn emulation_agrees_with_the_oracle() {
    let place = Place::new();
    for (words, scheme, kernels, exact) in [
        ("--head-dim 64 --causal", "INT8 QK per-thread · smooth K (of 128 rows) · FP16 PV (f32)", 3, 0.03),
        (
            "--dtype bf16 --seq 70 --kv-len 90 --head-dim 40 --heads 2",
            "INT8 QK per-thread · smooth K (of 128 rows) · BF16 PV (f32)",
            3,
            0.03,
        ),
        ("--scheme full --target sm_80 --heads 4 --kv-heads 2", "full QK · FP16 PV (f32)", 1, 0.002),
        ("--seq 1 --kv-len 600 --heads 2", "full QK · FP16 PV (f32)", 2, 0.002),
        (
            "--scheme sage2-int8-fp8-per-thread --seq 65 --heads 2",
            "INT8 QK per-thread · smooth K · FP8 PV (448, f32+f32)",
            3,
            0.08,
        ),
    ] {
        let report = emulated(&place, words, exact);
        assert_eq!(report["scheme"], scheme, "{words}");
        assert_eq!(launches(&report), kernels, "{words}: {report}");
    }
}

#[test]
fn emulation_takes_every_option_of_a_call() {
    let place = Place::new();
    for words in [
        "--lse --batch 2 --heads 1 --layout nhd --causal --window 20,any --softcap 3 --sm-scale 0.2 --seq 70",
        "--lse --heads 1 --causal=top-left --seq 40 --kv-len 100",
        "--lse --heads 2 --kv-heads 1 --padding 100",
        "--lse --heads 1 --batch 2 --mask bool --kv-lens 100,20",
        "--lse --heads 2 --kv-heads 1 --mask f16 --seq 50 --kv-len 77",
        "--heads 1 --mask bf16 --scheme full --dtype bf16",
        "--lse --heads 1 --mask f32 --layout nhd",
        "--lse --heads 2 --cu-seqlens 0,50,128 --causal",
        "--lse --heads 1 --cu-seqlens 0,50,128 --cu-seqlens-k 0,0,70 --window 30,30",
    ] {
        let report = emulated(&place, words, 0.03);
        let pass = &report["passes"][0];
        assert_eq!((&pass["pass"], report["passes"].as_array().unwrap().len()), (&"forward".into(), 1));
        let names: Vec<&Value> =
            report["launches"].as_array().unwrap().iter().map(|launch| &launch["kernel"]).collect();
        assert_eq!(names, pass["kernels"].as_array().unwrap().iter().collect::<Vec<_>>(), "{words}");
    }
}

#[test]
fn emulation_decodes() {
    let place = Place::new();
    for (words, appends, attends, exact) in [
        // The tokens before the query, and then that of the query.
        ("--kv-cache f16 --seq 1 --kv-len 200 --heads 4 --kv-heads 2 --causal --lse", 2, 1, 0.02),
        // Two sequences of one length, one with all tokens at once, one with none.
        (
            "--kv-cache int8 --batch 4 --kv-lens 90,90,3,0 --kv-len 90 --seq 4 --heads 1 --causal --window \
             50,any --lse",
            3,
            1,
            0.03,
        ),
        (
            "--kv-cache fp8-e4m3 --page-size 16 --seq 2 --kv-len 40 --heads 2 --layout nhd --dtype bf16",
            2,
            1,
            0.06,
        ),
        (
            "--kv-cache bf16 --seq 1 --kv-len 900 --heads 1 --softcap 2 --sm-scale 0.3 --target sm_80 --lse",
            2,
            2,
            0.02,
        ),
    ] {
        let report = emulated(&place, words, exact);
        // Each append writes and counts; attention of many tokens is of parts, which are merged.
        assert_eq!(launches(&report), 2 * appends + attends, "{words}");
        let passes: Vec<&Value> =
            report["passes"].as_array().unwrap().iter().map(|pass| &pass["pass"]).collect();
        assert_eq!(passes, ["append", "attend"], "{words}");
    }
    let text = place.succeed("emulate --kv-cache int8 --page-size 32 --seq 1 --kv-len 600 --heads 1");
    for words in [
        "\nscheme      KV cache: INT8 keys, values in int8, pages of 32 tokens\n",
        "\npass        append\nkernel      cache_append_f16_int8_p32_d64\nkernel      cache_advance\n",
        "\nslot        partial, 768 bytes\n",
        "\nbecause     tokens in 3 parts",
    ] {
        assert!(text.contains(words), "`{words}` not in\n{text}");
    }
}

#[test]
fn emulation_reads_well() {
    let text = Place::new().succeed("emulate --seq 1 --kv-len 600 --heads 2 --causal --lse");
    assert!(
        text.starts_with(
            "Emulated\nproblem     f16, batch 1, 2 query heads, 2 key heads, 1 queries × 600 keys"
        )
    );
    for words in [
        "\nvisible     causal (the last query sees the last key)\n",
        "\ndevice      sm_89, 128 multiprocessors\n",
        "\npass        forward\n",
        "\nslot        partial, 1024 bytes\n",
        "\nbecause     full precision: 1 query rows",
        "\nbecause     keys in 2 parts",
        ": grid 1×1×1, blocks of 128×1×1 threads\n",
        "    mma.m16n8k16.f32.f16 ",
        "  bank conflicts ",
        "  sectors of global memory ",
        "  output       definition  ",
        "  log-sum-exp  exact attention  ",
        "\nNo fault found; emulated in ",
    ] {
        assert!(text.contains(words), "`{words}` not in\n{text}");
    }
}

/// What is explained for a target is what the emulator runs.
#[test]
fn explaining_a_target_needs_no_gpu() {
    let place = Place::new();
    for words in [
        "--heads 2 --causal --lse --target sm_90a",
        "--heads 1 --batch 2 --mask bool --kv-lens 100,20 --target sm_80",
        "--heads 1 --seq 1 --kv-len 700 --multiprocessors 20 --target sm_89",
        "--heads 1 --cu-seqlens 0,50,128 --target sm_89",
        "--heads 2 --kv-heads 1 --kv-cache int8 --seq 1 --kv-len 300 --target sm_90a",
    ] {
        let explained = place.json(&format!("explain --json {words}"));
        let emulated = place.json(&format!("emulate --json {words}"));
        for name in ["passes", "scheme", "reasons", "splits", "target", "multiprocessors", "kv_len", "call"] {
            assert_eq!(explained[name], emulated[name], "{name} of {words}");
        }
    }
    // A problem that no memory here holds.
    let report =
        place.json("explain --json --batch 64 --heads 32 --seq 65536 --head-dim 128 --target sm_90a");
    let pass = &report["passes"][0];
    assert!(
        pass["kernels"]
            .as_array()
            .unwrap()
            .iter()
            .any(|name| name.as_str().unwrap().starts_with("attention"))
    );
    let slots = pass["workspace"].as_array().unwrap();
    let bytes: u64 = slots.iter().map(|slot| slot["bytes"].as_u64().unwrap()).sum();
    assert!(bytes > 1 << 33 && bytes <= pass["workspace_bytes"].as_u64().unwrap(), "{report}");
}

/// The plan is the one of the shortest predicted time; where no costs were measured, nothing is predicted.
#[test]
fn what_was_weighed_is_explained() {
    let place = Place::new();
    for words in
        ["--heads 24 --seq 1024 --dtype bf16", "--heads 16 --batch 4 --seq 300 --head-dim 64 --causal"]
    {
        let report = place.json(&format!("explain --json {words} --target sm_90a"));
        let weighed = report["weighed"].as_array().unwrap();
        assert!(weighed.len() > 6, "{weighed:?}");
        let times: Vec<f64> = weighed.iter().map(|row| row["predicted_us"].as_f64().unwrap()).collect();
        assert!(times.is_sorted(), "{times:?}");
        let planned: Vec<bool> = weighed.iter().map(|row| row["planned"].as_bool().unwrap()).collect();
        assert!(planned[0] && !planned[1..].contains(&true), "{weighed:?}");
        let shown = String::from_utf8(place.run(&format!("explain {words} --target sm_90a")).stdout).unwrap();
        assert!(shown.contains("predicted µs") && shown.contains("planned"), "{shown}");
    }
    let report = place.json("explain --json --heads 24 --seq 1024 --target sm_89");
    assert_eq!(report["weighed"].as_array().map(Vec::len), Some(0), "{report}");
}

/// The command's exit code, and the one line that it writes to standard error.
fn refused(rows: &[(&str, i32, &str)]) {
    let place = Place::new();
    for (words, code, line) in rows {
        let output = place.run(words);
        let found = (output.status.code(), String::from_utf8(output.stderr).unwrap());
        assert_eq!(found, (Some(*code), format!("error: {line}\n")), "sageattn {words}");
    }
}

#[test]
fn options_that_do_not_serve() {
    refused(&[
        (
            "emulate --target ada",
            2,
            "invalid value 'ada' for '--target <SM>': target: value is `ada`, expected sm_75 to sm_121, such \
             as sm_89 or sm_90a (see --help)",
        ),
        ("emulate --dtype f32", 1, "q: dtype is f32, expected f16 or bf16 on a GPU"),
        ("emulate --kv-cache int8 --dtype f32", 1, "q: dtype is f32, expected f16 or bf16 on a GPU"),
        (
            "emulate --kv-cache q8",
            2,
            "invalid value 'q8' for '--kv-cache <VALUES>': expected one of f16, bf16, fp8-e4m3, int8 (see \
             --help)",
        ),
        (
            "emulate --kv-cache int8 --page-size 17",
            1,
            "page_size: value is 17, expected a power of two from 16 to 1024",
        ),
        (
            "emulate --page-size 16",
            2,
            "the following required arguments were not provided: --kv-cache <VALUES> (see --help)",
        ),
        (
            "emulate --kv-cache int8 --causal=top-left",
            1,
            "a mask that is not aligned bottom-right over a KV cache on a GPU is not supported: align it \
             bottom-right: \
             the last query is that of the last cached token",
        ),
        (
            "emulate --kv-cache int8 --mask bool",
            2,
            "the argument '--kv-cache <VALUES>' cannot be used with '--mask <DTYPE>' (see --help)",
        ),
        (
            "emulate --mask int8",
            2,
            "invalid value 'int8' for '--mask <DTYPE>' [possible values: bool, f32, f16, bf16] (see --help)",
        ),
        ("emulate --padding 129", 1, "padding: value is 129, expected at most the 128 keys"),
        ("emulate --kv-lens 5,6", 1, "kv_lens: shape is [2], expected [1], one for each batch entry"),
        (
            "emulate --kv-cache f16 --kv-lens 129",
            1,
            "kv_lens[0]: value is 129, expected 0 to 128, k's length",
        ),
        ("emulate --cu-seqlens 3,9", 1, "cu_seqlens_q[0]: value is 3, expected 0"),
        ("emulate --cu-seqlens 0,-9", 1, "cu_seqlens_q: value is -9, expected at least 0"),
        (
            "emulate --cu-seqlens 0,65537",
            2,
            "--cu-seqlens: total is 65537, expected at most 65536 in the emulator",
        ),
        (
            "emulate --cu-seqlens 0,9 --seq 9",
            2,
            "the argument '--cu-seqlens <N,…>' cannot be used with '--seq <N>' (see --help)",
        ),
        (
            "emulate --cu-seqlens-k 0,9",
            2,
            "the following required arguments were not provided: --cu-seqlens <N,…> (see --help)",
        ),
    ]);
}

#[test]
fn sizes_and_schemes_that_cannot_be_emulated() {
    refused(&[
        ("emulate --batch 0", 2, "--batch: value is 0, expected 1 to 65535 in the emulator"),
        ("emulate --kv-len 65537", 2, "--kv-len: value is 65537, expected 1 to 65536 in the emulator"),
        (
            "emulate --head-dim 577",
            2,
            "invalid value '577' for '--head-dim <N>': 577 is not in 1..=576 (see --help)",
        ),
        ("emulate --seq 0", 2, "--seq: value is 0, expected 1 to 65536 in the emulator"),
        (
            "emulate --heads 8 --kv-heads 3",
            1,
            "k: shape is [1, 3, 128, 64], expected a number of heads that divides q's 8",
        ),
        (
            "emulate --scheme sage2-int8-fp8-per-thread --target sm_86",
            1,
            "FP8 P·V on sm_86 is not supported: FP8 needs sm_89 or later; use FP16 P·V; the nearest that this \
             GPU computes is \
             `sage2-int8-fp16-per-thread`, INT8 QK per-thread · smooth K · FP16 PV (f32)",
        ),
        (
            "emulate --kv-cache fp8-e4m3 --target sm_86",
            1,
            "a KV cache with values in fp8-e4m3 on sm_86 is not supported: they need sm_89 or later; the nearest \
             that this GPU stores is int8",
        ),
        (
            "emulate --heads 4096 --seq 65536",
            1,
            "a buffer of 34359738368 bytes is not supported: the emulator's have at most 4294967296",
        ),
        (
            "emulate --scheme sage3-nvfp4",
            1,
            "NVFP4 Q·Kᵀ on sm_89 is not supported: block-scaled FP4 needs sm_120a or sm_121a; the nearest that \
             this GPU computes is \
             `sage2-int8-fp8-per-thread`, INT8 QK per-thread · smooth K · FP8 PV (448, f32+f32)",
        ),
    ]);
}

#[test]
fn plans_that_cannot_be_explained_or_tuned() {
    refused(&[
        (
            "explain --kv-cache fp8-e4m3 --target sm_86",
            1,
            "a KV cache with values in fp8-e4m3 on sm_86 is not supported: they need sm_89 or later; the nearest \
             that this GPU stores is int8",
        ),
        (
            "explain --kv-cache bf16 --target sm_75",
            1,
            "a KV cache with values in bf16 on sm_75 is not supported: they need sm_80 or later; the nearest that \
             this GPU stores is f16",
        ),
        (
            "explain --kv-cache int8",
            2,
            "--kv-cache: found no --target, expected one, such as sm_89: its passes are a GPU's",
        ),
        (
            "explain --target sm_89 --device cpu",
            2,
            "the argument '--target <SM>' cannot be used with '--device <DEVICE>' (see --help)",
        ),
        (
            "explain --multiprocessors 3",
            2,
            "the following required arguments were not provided: --target <SM> (see --help)",
        ),
        (
            "explain --heads 65536 --seq 1073741824 --target sm_89",
            1,
            "batch · heads · seq · kv_len: value is 75557863725914323419136, expected at most \
             4503599627370496 on a GPU",
        ),
        ("tune --device cpu", 1, "device: value is cpu, expected cuda:N"),
    ]);
}
