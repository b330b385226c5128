//! Attention sinks on the command line, in every command that takes them.

#![allow(clippy::unwrap_used)] // the helpers of tests are tests too

mod common;

use common::{Place, file, qkv};
use safetensors::tensor::{Dtype, SafeTensors};
use sage_core::metrics::Accuracy;
use sage_core::{Call, Inputs, Options, Tensor, TensorView, View, oracle};
use sage_testkit::uniform;
use serde_json::Value;

const SINKS: [f32; 4] = [0.5, -1.0, f32::NEG_INFINITY, 3.0];

/// A file of the tensors of [`qkv`] and of sinks: "sinks" holds others than "own.sinks", in bf16.
fn place() -> Place {
    let f32s = |sinks: &[f32]| sinks.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let upper = |sinks: &[f32]| sinks.iter().flat_map(|x| x.to_bits().to_le_bytes()[2..].to_vec()).collect();
    let own = qkv().into_iter().map(|(name, dtype, shape, bytes)| {
        (
            ["own.q", "own.k", "own.v"][["q", "k", "v"].iter().position(|known| *known == name).unwrap()],
            dtype,
            shape,
            bytes,
        )
    });
    let of_own = ("own.sinks", Dtype::BF16, vec![4], upper(&SINKS));
    let others = ("sinks", Dtype::F32, vec![4], f32s(&[9.0; 4]));
    let place = Place::new();
    place.write("in.safetensors", &file(&qkv()));
    place.write("own.safetensors", &file(&own.chain([of_own, others]).collect::<Vec<_>>()));
    place.write("flat.safetensors", &file(&[("sinks", Dtype::F32, vec![2, 2], f32s(&SINKS))]));
    place
}

/// Exact attention of the tensors of [`qkv`].
fn exact(sinks: Option<&[f32]>) -> oracle::Output {
    let [q, k, v] = [(1, [1, 4, 33, 16]), (2, [1, 2, 40, 16]), (3, [1, 2, 40, 16])]
        .map(|(seed, shape)| Tensor::new(uniform(seed, shape.iter().product()), &shape).unwrap());
    let sinks = sinks.map(|sinks| TensorView::F32(View::contiguous("sinks", sinks, &[sinks.len()]).unwrap()));
    let inputs = Inputs::new(q.view(), k.view(), v.view()).sinks(sinks);
    oracle::exact(&Call::check(&inputs, &Options::default()).unwrap())
}

fn floats(bytes: &[u8], name: &str) -> Vec<f32> {
    let (quads, _) = SafeTensors::deserialize(bytes).unwrap().tensor(name).unwrap().data().as_chunks::<4>();
    quads.iter().map(|&quad| f32::from_le_bytes(quad)).collect()
}

#[test]
fn run_takes_numbers_and_files() {
    let place = place();
    let expected = exact(Some(&SINKS));
    for (words, prefix) in [
        ("in.safetensors --sinks 0.5,-1,-inf,3", ""),
        ("in.safetensors --sinks=0.5,-1,-inf,3", ""),
        ("own.safetensors --sinks own.safetensors", "own."),
    ] {
        place.succeed(&format!("run {words} -o out.safetensors --scheme full --lse"));
        let bytes = place.read("out.safetensors");
        let out = floats(&bytes, &format!("{prefix}out"));
        assert!(Accuracy::of(&out, &expected.out).max_abs_error < 1e-5, "{words}");
        let lse = floats(&bytes, &format!("{prefix}lse"));
        assert!(lse.iter().zip(&expected.lse).all(|(x, e)| (f64::from(*x) - e).abs() < 1e-5), "{words}");
    }
    // One number is every head's.
    place.succeed("run in.safetensors -o out.safetensors --scheme full --sinks 2");
    let out = floats(&place.read("out.safetensors"), "out");
    assert!(Accuracy::of(&out, &exact(Some(&[2.0; 4])).out).max_abs_error < 1e-5);
    assert!(Accuracy::of(&out, &exact(None).out).max_abs_error > 1e-2);
}

#[test]
fn schemes_are_measured_against_attention_with_sinks() {
    let place = place();
    let rows = |words: &str| place.json(words)["rows"].as_array().unwrap().clone();
    let number = |row: &Value, name: &str| row[name].as_f64().unwrap();
    let sinks = "--sinks 0.5,-1,-inf,3";
    for row in rows(&format!("accuracy in.safetensors --schemes full {sinks} --json")) {
        assert!(number(&row, "max_abs_error") < 1e-5, "{row}");
    }
    let text = place.succeed(&format!("accuracy in.safetensors --schemes full {sinks}"));
    assert!(
        text.starts_with("in.safetensors · q [1, 4, 33, 16], k [1, 2, 40, 16], f32, attention sinks\n"),
        "{text}"
    );
    // Over all blocks the schemes' kernels, pooled terms and filtered tiles are exact; sinks of half the blocks are not.
    let sparse = |topk: &str| {
        let words = format!(
            "sparse in.safetensors --predictor sla --topk {topk} --blocks 8x8 --scheme full --pooled-tail \
             --pvthreshd 1000 --reps 1 {sinks} --json"
        );
        rows(&words).remove(0)
    };
    let all = sparse("1");
    for row in [&all, &all["pooled_tail"], &all["pv_filter"][0]] {
        assert!(number(row, "relative_l1") < 1e-5, "{all}");
    }
    assert!(number(&sparse("0.5"), "relative_l1") > 0.01);
    let report = place.json("bench --shapes 1,2,64,32 1,4,64,32 --schemes full --reps 1 --sinks=-1 --json");
    assert_eq!((report["sinks"].as_str(), report["rows"].as_array().unwrap().len()), (Some("-1"), 2));
}

#[test]
fn plans_and_emulated_passes_have_them() {
    let place = Place::new();
    for words in [
        "--heads 3 --seq 20 --sinks 1,-inf,4 --lse --causal",
        "--heads 3 --seq 1 --kv-len 700 --sinks 2 --multiprocessors 90",
        "--heads 4 --kv-heads 2 --seq 1 --kv-len 100 --kv-cache int8 --sinks 2,1,0,3 --lse",
    ] {
        let report = place.json(&format!("emulate --json {words}"));
        let close = |report: &Value, name: &str, bound: f64| {
            let found = report[name].as_f64().unwrap();
            assert!(found < bound, "{words}: {found}");
        };
        close(&report["against_scheme"], "relative_l1", 0.02);
        close(&report["against_exact"], "relative_l1", 0.03);
        if words.contains("--lse") {
            close(&report["lse"]["against_exact"], "max_abs_error", 0.1);
        }
        let plan = place.json(&format!("explain --json --target sm_89 {words}"));
        assert_eq!(plan["sinks"], true);
    }
    let text = place.succeed("explain --heads 2 --sinks 1,2");
    assert!(text.contains("a sink for each head"), "{text}");
    assert_eq!(place.json("explain --heads 2 --json")["sinks"], false);
}

#[test]
fn what_cannot_be_sinks_is_named() {
    let place = place();
    for (words, line) in [
        (
            "run in.safetensors -o out.safetensors --sinks 1,2",
            "in.safetensors: sinks: shape is [2], expected [4], one for each query head",
        ),
        (
            "run in.safetensors -o out.safetensors --sinks 1,2,nan,4",
            "in.safetensors: sinks[2]: value is NaN, expected a number, or -inf for none",
        ),
        (
            "explain --heads 3 --sinks flat.safetensors",
            "flat.safetensors: tensor \"sinks\": shape is [2, 2], expected [num_q_heads]",
        ),
        (
            "accuracy in.safetensors --sinks in.safetensors",
            "in.safetensors: no tensor named \"sinks\"; found k, q, v",
        ),
        (
            "sparse in.safetensors --predictor sla --topk 0.5 --sinks 1,2,3,inf",
            "in.safetensors: sinks[3]: value is inf, expected a number, or -inf for none",
        ),
    ] {
        let output = place.run(words);
        let found = (output.status.code(), String::from_utf8(output.stderr).unwrap());
        assert_eq!(found, (Some(1), format!("error: {line}\n")), "sageattn {words}");
    }
    let output = place.run("explain --heads 2 --sinks 1,x");
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        error.starts_with("error: sinks: value is 1,x, expected numbers, or a file that can be read: "),
        "{error}"
    );
}
