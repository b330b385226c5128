//! Block-sparse attention on the command line: `sageattn sparse`, and predictors in the other commands.

#![allow(clippy::unwrap_used)] // the helpers of tests are tests too

mod common;

use common::{Place, file, qkv};
use sage_core::metrics::Accuracy;
use sage_core::sparse::{BlockMap, Predictor, pooled_tail};
use sage_core::{Alignment, Band, Call, Inputs, Options, Tensor, oracle};
use sage_testkit::uniform;
use serde_json::Value;

fn place_with_file() -> Place {
    let place = Place::new();
    place.write("in.safetensors", &file(&qkv()));
    place
}

fn number(row: &Value, name: &str) -> f64 {
    row[name].as_f64().unwrap_or_else(|| panic!("{name} of {row}"))
}

fn rows(report: &Value) -> Vec<Value> {
    report["rows"].as_array().unwrap().clone()
}

/// The tensors of [`qkv`], and what exact attention makes of them over predicted blocks, without and with pooled terms.
struct Expected {
    map: BlockMap,
    dense: Vec<f64>,
    sparse: Vec<f64>,
    tail: Vec<f64>,
}

fn expected(predictor: &Predictor, band: Band) -> Expected {
    let [q, k, v] = [(1, [1, 4, 33, 16]), (2, [1, 2, 40, 16]), (3, [1, 2, 40, 16])]
        .map(|(seed, shape)| Tensor::new(uniform(seed, shape.iter().product()), &shape).unwrap());
    let inputs = Inputs::new(q.view(), k.view(), v.view());
    let call = Call::check_sparse(&inputs, &Options::default().band(band), predictor).unwrap();
    let map = predictor.map(&call).unwrap();
    let (sparse, tail) = {
        let over = call.over(&map).unwrap();
        (oracle::exact(&over).out, pooled_tail(&over).out)
    };
    Expected { dense: oracle::exact(&call).out, sparse, tail, map }
}

#[test]
fn sparse_says_what_the_library_computes() {
    let place = place_with_file();
    for (words, band) in [("", Band::FULL), ("--causal=top-left", Band::causal(Alignment::TopLeft))] {
        let report = place.json(&format!(
            "sparse in.safetensors --predictor sla --topk 0.5 --blocks 8x8 --scheme full --pooled-tail \
             --pvthreshd 1000 --reps 1 --json {words}"
        ));
        let all = rows(&report);
        assert_eq!(all.len(), 1);
        let row = &all[0];
        let expected = expected(&Predictor::sla(0.5).blocks(8, 8), band);
        let close = |found: f64, out: &[f64]| {
            let wanted = Accuracy::of(out, &expected.dense).relative_l1;
            assert!((found - wanted).abs() < 1e-5 && wanted > 0.01, "{words}: {found}, expected {wanted}");
        };
        close(number(row, "relative_l1"), &expected.sparse);
        close(number(&row["pooled_tail"], "relative_l1"), &expected.tail);
        // Keys that nothing sees are no part of a call: 33 are left of 40 with a top-left diagonal.
        let kv_len = if words.is_empty() { 40 } else { 33 };
        let density = expected.map.density(&band, 33, kv_len).unwrap();
        assert_eq!(number(row, "density"), density);
        let filters = row["pv_filter"].as_array().unwrap();
        assert_eq!(filters[0]["skipped"], 0, "no tile lies 1000 binary digits below its rows' maxima");
        close(number(&filters[0], "relative_l1"), &expected.sparse);
        let heads = row["per_head"].as_array().unwrap();
        assert_eq!(heads.len(), 4);
        if words.is_empty() {
            let mean: f64 = heads.iter().map(|head| number(head, "density")).sum::<f64>() / 4.0;
            assert!((mean - density).abs() < 1e-12, "heads have equally many blocks");
        }
    }
}

#[test]
fn every_predictor_trades_density_for_error() {
    let place = Place::new();
    let report = place.json(
        "sparse --video 3x8x16 --heads 4 --head-dim 32 --dtype f32 --scheme full \
         --predictor sparge,sla,sparge2,vsa,sol --blocks 32x32 --sink --reps 1 --json",
    );
    let rows = rows(&report);
    for system in ["sparge", "sla", "sparge2", "vsa", "sol"] {
        let mut points: Vec<(f64, f64)> = rows
            .iter()
            .filter(|row| row["predictor"] == system)
            .map(|row| (number(row, "density"), number(row, "relative_l1")))
            .collect();
        assert_eq!(points.len(), 6, "{system}");
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (sparsest, densest) = (points[0], points[5]);
        assert!(sparsest.0 < 0.5 && densest.0 < 1.0, "{system}: {points:?}");
        assert!(sparsest.1 > 2.0 * densest.1, "{system}: {points:?}");
    }
    for row in &rows {
        assert_eq!((&row["block_q"], &row["block_k"]), (&Value::from(32), &Value::from(32)));
        for name in ["median_ms", "prediction_ms", "time_share"] {
            assert!(number(row, name) > 0.0, "{name} of {row}");
        }
        // In full precision, and in single, dense attention is exact to its last digits.
        let (exact, dense) = (number(row, "relative_l1"), number(&row["against_dense"], "relative_l1"));
        assert!((exact - dense).abs() < 1e-4, "{row}");
    }
}

#[test]
fn all_blocks_are_dense_attention() {
    let place = Place::new();
    let report = place.json(
        "sparse --video 4x8x16 --heads 4 --predictor sla --topk 1 --pooled-tail --pvthreshd 5,1000 --scheme int8 \
         --reps 1 --json",
    );
    let row = &rows(&report)[0];
    assert_eq!(number(row, "density"), 1.0);
    assert_eq!(row["pooled_tail"]["relative_l1"], row["relative_l1"], "nothing is left out: {row}");
    assert!(number(&row["against_dense"], "relative_l1") < 1e-3, "{row}");
    assert!(number(row, "relative_l1") > 1e-3, "what quantising costs is left: {row}");
    // Tiles whose probabilities are all below 2⁻⁵ of their rows' largest, and an error that fits.
    let [some, none] = [0, 1].map(|i| row["pv_filter"][i].clone());
    assert!(some["skipped"].as_u64().unwrap() > 0 && some["visited"].as_u64().unwrap() > 500, "{some}");
    assert!((1e-6..0.05).contains(&number(&some, "relative_l1")), "{some}");
    assert!(none["skipped"] == 0 && number(&none, "relative_l1") < 1e-9, "{none}");
}

#[test]
fn tables_and_pictures_are_for_people() {
    let place = Place::new();
    let words = "sparse --video 2x8x16 --heads 2 --head-dim 32 --predictor sla --topk 0.25,0.5 --reps 1";
    let text = place.succeed(&format!("{words} --per-head --plot a.svg --map m.png --map-head 1"));
    for part in ["video 2x8x16 · q [1, 2, 256, 32]", "sla topk 0.5 64x64", "plot written to a.svg"] {
        assert!(text.contains(part), "{part} not in\n{text}");
    }
    place.succeed(&format!("{words} --map m.svg --json"));
    let svg = String::from_utf8(place.read("m.svg")).unwrap();
    // Half of four blocks, and the caption.
    assert!(svg.contains("Blocks computed of head 0: 50.0 %") && svg.contains("sla topk 0.5 64x64"), "{svg}");
    let plot = String::from_utf8(place.read("a.svg")).unwrap();
    assert!(plot.contains("Error against density") && plot.contains("sla 64x64"), "{plot}");
    let mut reader = png::Decoder::new(std::io::Cursor::new(place.read("m.png"))).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut pixels).unwrap();
    let blue = pixels.chunks(3).filter(|pixel| pixel == &[0, 114, 178]).count();
    assert!(blue > 1000, "{blue} pixels of blocks");
}

#[test]
fn other_commands_take_predictors() {
    let place = place_with_file();
    let predictor = "--predictor sla --topk 0.5 --blocks 8x8";
    let report = place.json(&format!("accuracy in.safetensors --schemes full {predictor} --json"));
    let expected = expected(&Predictor::sla(0.5).blocks(8, 8), Band::FULL);
    let wanted = Accuracy::of(&expected.sparse, &expected.dense).relative_l1;
    let all = rows(&report);
    assert_eq!(all.len(), 2, "the kernels and the definition");
    for row in all {
        assert_eq!(row["predictor"], "sla topk 0.5 8x8");
        assert!((number(&row, "relative_l1") - wanted).abs() < 1e-5, "{row}");
    }
    let report = place
        .json("bench --shapes 1,2,256,32 --schemes full --reps 1 --json --predictor sol --tau 0.5 --sink=2");
    assert_eq!(report["predictor"], "sol tau 0.5 64x64, sink 2");
    assert_eq!(rows(&report)[0]["peak_memory_bytes"].is_u64(), cfg!(target_os = "linux"));
    let report = place.json("explain --seq 1000 --predictor sparge --cdf 0.98 --json");
    assert_eq!(report["predictor"], "sparge cdf 0.98 128x64");
    let plan = report["plan"].as_array().unwrap();
    let says = |line: &Value| line.as_str().unwrap().contains("those of a block of the mask");
    assert!(plan.iter().any(says), "{plan:?}");
}

/// The launches of a prediction, those of attention over its map, and how much of that is expected.
#[test]
fn a_target_shows_the_prediction_and_what_it_leaves() {
    let place = Place::new();
    let explain = |words: &str| {
        place.json(&format!("explain --heads 24 --seq 4096 --head-dim 128 --dtype bf16 --json {words}"))
    };
    let passes = |report: &Value| -> Vec<(String, Vec<String>)> {
        let words = |value: &Value| value.as_str().unwrap().to_owned();
        let pass = |pass: &Value| {
            (words(&pass["pass"]), pass["kernels"].as_array().unwrap().iter().map(words).collect())
        };
        report["passes"].as_array().unwrap().iter().map(pass).collect()
    };
    let density = |report: &Value| {
        (report["density"]["expected"].as_f64().unwrap(), report["density"]["is_least"].as_bool().unwrap())
    };
    for target in ["sm_75", "sm_89", "sm_90a"] {
        let report = explain(&format!("--predictor sla --topk 0.1 --target {target}"));
        assert_eq!(report["predictor"], "sla topk 0.1 64x64");
        let passes = passes(&report);
        assert_eq!(passes.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["predict", "forward"]);
        let [predict, forward] = [0, 1].map(|pass: usize| passes[pass].1.join(" "));
        for kernel in ["sum_blocks", "mean_of_blocks", "pool_blocks", "score_blocks", "choose_blocks_top"] {
            assert!(predict.contains(kernel), "{target}: {predict}");
        }
        assert!(forward.contains("list_tiles") && !forward.contains("choose"), "{target}: {forward}");
        // 6 of 64 blocks.
        assert_eq!(density(&report), (0.09375, false));
        assert!(report["workspace_bytes"].as_u64().unwrap() > 0);
    }
    let report = explain("--predictor sparge --cdf 0.9 --causal --target sm_90a");
    let (share, is_least) = density(&report);
    assert!(is_least && (0.01..0.1).contains(&share), "{share}");
    let packed = explain_packed(&place);
    assert!(packed.contains("choose_blocks_beyond_sigmas_4_packed"), "{packed}");
    assert!(packed.contains("density     about 0.159, of the blocks that the mask shows"), "{packed}");
    assert_eq!(explain("--target sm_90a")["density"], Value::Null);
}

fn explain_packed(place: &Place) -> String {
    place.succeed("explain --cu-seqlens 0,3000,5000 --predictor sol --tau 1 --target sm_89")
}

#[test]
fn what_does_not_go_together_is_refused_by_name() {
    let place = place_with_file();
    for (words, code, line) in [
        (
            "sparse in.safetensors",
            2,
            "the following required arguments were not provided: --predictor <NAME> (see --help)",
        ),
        (
            "sparse --predictor sla",
            2,
            "the following required arguments were not provided: <IN>... (see --help)",
        ),
        (
            "sparse in.safetensors --predictor sla --dtype f32",
            2,
            "the argument '[IN]...' cannot be used with '--dtype <DTYPE>' (see --help)",
        ),
        (
            "sparse in.safetensors --predictor sla --tau 1",
            2,
            "--tau: found with --predictor sla, which has none",
        ),
        (
            "sparse in.safetensors --predictor sol --simthreshd1 0",
            2,
            "--simthreshd1: found with --predictor sol, expected sparge",
        ),
        (
            "sparse in.safetensors --predictor vsa --topk 0.5",
            2,
            "--topk: value is 0.5, expected a number of blocks of at least 1 for vsa",
        ),
        (
            "sparse in.safetensors --predictor sla --topk 1.5",
            1,
            "in.safetensors: topk: value is 1.5, expected 0 to 1",
        ),
        (
            "sparse in.safetensors --predictor sla --topk 0.5 --pvthreshd=-1 --reps 1",
            1,
            "in.safetensors: pvthreshd: value is -1, expected a finite number of at least 0",
        ),
        (
            "sparse in.safetensors --predictor sla --map m.png --map-head 4",
            2,
            "--map-head: value is 4, expected one of 4 heads",
        ),
        (
            "sparse in.safetensors --predictor sla --map m.gif",
            2,
            "--map: file is m.gif, expected a name ending in .png or .svg",
        ),
        (
            "sparse --video 3x3 --predictor sla",
            2,
            "invalid value '3x3' for '--video <TxHxW>': expected FRAMESxHEIGHTxWIDTH such as 9x24x30 (see --help)",
        ),
        (
            "sparse --video 2x2x2 --head-dim 7 --predictor sla",
            1,
            "head_dim: value is 7, expected an even number, as RoPE rotates pairs",
        ),
        (
            "bench --predictor sla --blocks 64",
            2,
            "invalid value '64' for '--blocks <QxK>': expected QUERIESxKEYS such as 128x64 (see --help)",
        ),
        ("bench --predictor sla", 2, "--predictor: found sla without an amount, expected --topk"),
        (
            "bench --predictor sparge2 --topp 0.1,0.2",
            2,
            "--predictor: found 2 settings, expected one: one value of each option",
        ),
        ("explain --predictor sla,sol --topk 0.1", 2, "--predictor: found 2, expected one"),
        (
            "accuracy in.safetensors --topk 0.1",
            2,
            "the following required arguments were not provided: --predictor <NAME> (see --help)",
        ),
        (
            "explain --predictor sla --topk 0.1 --gpu h200",
            2,
            "the argument '--predictor <NAME>' cannot be used with '--gpu <NAME>' (see --help)",
        ),
        (
            "explain --predictor sla --topk 0.1 --dtype f32 --target sm_90a",
            1,
            "a prediction from f32 on a GPU is not supported: use f16 or bf16",
        ),
    ] {
        let output = place.run(words);
        let found = (output.status.code(), String::from_utf8(output.stderr).unwrap());
        assert_eq!(found, (Some(code), format!("error: {line}\n")), "sageattn {words}");
    }
}
