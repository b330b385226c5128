//! What the commands do when all is well.

#![allow(clippy::unwrap_used)] // the helpers of tests are tests too

mod common;

use common::{Place, f32s, file, qkv};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use sage_core::metrics::Accuracy;
use sage_core::{Call, Inputs, oracle};
use sage_testkit::uniform;
use sageattention::{Attention, Mask, Preset, Tensor, View};
use serde_json::Value;

/// The tensors of [`qkv`].
fn tensors() -> [Tensor; 3] {
    [(1, [1, 4, 33, 16]), (2, [1, 2, 40, 16]), (3, [1, 2, 40, 16])]
        .map(|(seed, shape)| Tensor::new(uniform(seed, shape.iter().product()), &shape).unwrap())
}

fn exact(attention: &Attention<'_>, mask: Option<Mask<'_>>) -> oracle::Output {
    let [q, k, v] = tensors();
    let inputs = Inputs::new(q.view(), k.view(), v.view()).mask(mask);
    oracle::exact(&Call::check(&inputs, &attention.options()).unwrap())
}

/// A tensor of a file, which must be of this dtype and shape.
fn read(bytes: &[u8], name: &str, dtype: Dtype, shape: &[usize]) -> Vec<f32> {
    let tensors = SafeTensors::deserialize(bytes).unwrap();
    let tensor = tensors.tensor(name).unwrap();
    assert_eq!((tensor.dtype(), tensor.shape()), (dtype, shape));
    let data = tensor.data();
    match dtype {
        Dtype::F16 => data.chunks(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        _ => data.chunks(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}

fn place_with(bytes: &[u8]) -> Place {
    let place = Place::new();
    place.write("in.safetensors", bytes);
    place
}

/// Without quantisation nothing but the order of sums differs from exact attention.
#[test]
fn run_computes_attention() {
    let place = place_with(&file(&qkv()));
    let new = Attention::new;
    for (words, attention) in [
        ("", new()),
        ("--causal", new().causal(true)),
        ("--causal=top-left", new().causal_alignment(sageattention::Alignment::TopLeft)),
        ("--window 3,any", new().window(3, None)),
        ("--window -1,2 --sm-scale 0.5", new().window(None, 2).sm_scale(0.5)),
        ("--softcap 0.5", new().logit_softcap(0.5)),
    ] {
        place.succeed(&format!("run in.safetensors -o out.safetensors --scheme full --lse {words}"));
        let out = place.read("out.safetensors");
        let expected = exact(&attention, None);
        let accuracy = Accuracy::of(&read(&out, "out", Dtype::F32, &[1, 4, 33, 16]), &expected.out);
        assert!(accuracy.max_abs_error < 1e-5, "{words}: {accuracy}");
        let accuracy = Accuracy::of(&read(&out, "lse", Dtype::F32, &[1, 4, 33]), &expected.lse);
        assert!(accuracy.max_abs_error < 1e-4, "{words}: LSE {accuracy}");
    }
    assert_eq!(place.names(), ["in.safetensors", "out.safetensors"]);
}

/// The default scheme, in f16 and behind prefixes, on the shipped tensors: cosine above 0.9999.
#[test]
fn run_takes_every_prefix() {
    let place = place_with(include_bytes!("../data/minilm_qkv.safetensors"));
    let report = place.json("run in.safetensors -o out.safetensors --json");
    let prefixes: Vec<&Value> =
        report["layers"].as_array().unwrap().iter().map(|layer| &layer["prefix"]).collect();
    assert_eq!(prefixes, ["layer0.", "layer2."]);
    let (input, output) = (place.read("in.safetensors"), place.read("out.safetensors"));
    let shape = [1, 12, 512, 32];
    let tensor = |name| Tensor::new(read(&input, name, Dtype::F16, &shape), &shape).unwrap();
    let (q, k, v) = (tensor("layer2.q"), tensor("layer2.k"), tensor("layer2.v"));
    let call = Inputs::new(q.view(), k.view(), v.view());
    let expected = oracle::exact(&Call::check(&call, &Attention::new().options()).unwrap());
    let accuracy = Accuracy::of(&read(&output, "layer2.out", Dtype::F16, &shape), &expected.out);
    assert!(accuracy.cosine > 0.9999, "{accuracy}");
    place.succeed("run in.safetensors -o one.safetensors --prefix layer0.");
    assert_eq!(SafeTensors::deserialize(&place.read("one.safetensors")).unwrap().names(), ["layer0.out"]);
}

#[test]
fn run_takes_masks() {
    let visible: Vec<bool> = (0..33 * 40).map(|i| i % 7 != 0).collect();
    let bytes: Vec<u8> = visible.iter().map(|&v| u8::from(v)).collect();
    let added: Vec<u8> =
        visible.iter().flat_map(|&v| if v { 0f32 } else { f32::NEG_INFINITY }.to_le_bytes()).collect();
    let masks = vec![
        ("bool", Dtype::BOOL, vec![33, 40], bytes.clone()),
        ("u8", Dtype::U8, vec![33, 40], bytes),
        ("added", Dtype::F32, vec![33, 40], added),
    ];
    let place = place_with(&file(&[qkv(), masks].concat()));
    let mask = Mask::Bool(View::contiguous("mask", &visible, &[33, 40]).unwrap());
    let expected = exact(&Attention::new(), Some(mask)).out;
    for name in ["bool", "u8", "added"] {
        place.succeed(&format!("run in.safetensors -o out.safetensors --scheme full --mask {name}"));
        let out = read(&place.read("out.safetensors"), "out", Dtype::F32, &[1, 4, 33, 16]);
        let accuracy = Accuracy::of(&out, &expected);
        assert!(accuracy.max_abs_error < 1e-5, "{name}: {accuracy}");
    }
}

/// The output is an ordinary file, and an older one of its name is replaced.
#[cfg(unix)]
#[test]
fn run_replaces_an_older_output() {
    use std::os::unix::fs::PermissionsExt;
    let place = place_with(&file(&qkv()));
    place.write("plain", b"");
    place.write("out.safetensors", b"older");
    place.succeed("run in.safetensors -o out.safetensors");
    assert!(SafeTensors::deserialize(&place.read("out.safetensors")).is_ok());
    let mode = |name| std::fs::metadata(place.path(name)).unwrap().permissions().mode();
    assert_eq!(mode("out.safetensors"), mode("plain"));
}

#[test]
fn accuracy_measures_every_scheme() {
    let place = place_with(&file(&qkv()));
    let report = place.json("accuracy in.safetensors --json");
    let rows = report["rows"].as_array().unwrap();
    for preset in Preset::ALL {
        let row =
            rows.iter().find(|row| row["scheme"] == preset.name() && row["computed_by"] == "oracle").unwrap();
        assert_eq!(row["dtype"], "f32");
        for name in ["cosine", "relative_l1", "rmse", "max_abs_error"] {
            assert!(row[name].is_f64(), "{row}");
        }
        assert!(row["cosine"].as_f64().unwrap() > 0.98, "{row}");
        let heads = row["per_head"].as_array().unwrap();
        assert_eq!(heads.iter().map(|head| head["head"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3]);
    }
    // This machine's own kernels, and their full precision is nearly exact.
    let full = rows.iter().find(|row| row["scheme"] == "full" && row["computed_by"] == "cpu kernel").unwrap();
    assert!(full["max_abs_error"].as_f64().unwrap() < 1e-5, "{full}");
}

/// Values of other channels than keys, and one batch entry of both for two of queries: the output has q's rows and v's
/// channels, and each head of each entry is compared.
#[test]
fn files_may_hold_values_of_other_channels_and_one_batch_of_keys() {
    let tensors =
        [f32s("q", &[2, 4, 33, 24], 1), f32s("k", &[1, 2, 40, 24], 2), f32s("v", &[1, 2, 40, 16], 3)];
    let place = place_with(&file(&tensors));
    place.succeed("run in.safetensors -o out.safetensors --lse");
    read(&place.read("out.safetensors"), "out", Dtype::F32, &[2, 4, 33, 16]);
    let report = place.json("accuracy in.safetensors --schemes full --json");
    let rows = report["rows"].as_array().unwrap();
    let full = rows.iter().find(|row| row["computed_by"] == "cpu kernel").unwrap();
    assert!(full["max_abs_error"].as_f64().unwrap() < 1e-5, "{full}");
    assert_eq!(full["per_head"].as_array().unwrap().len(), 8, "{full}");
}

/// The same numbers whichever way round the dimensions are.
#[test]
fn accuracy_knows_layouts() {
    let transposed = |(name, dtype, shape, bytes): common::Entry<'static>| {
        let (heads, rows, row) = (shape[1], shape[2], shape[3] * 4);
        let order = (0..rows).flat_map(|i| (0..heads).map(move |h| h * rows + i));
        let bytes = order.flat_map(|at| bytes[at * row..(at + 1) * row].to_vec()).collect();
        (name, dtype, vec![shape[0], rows, heads, shape[3]], bytes)
    };
    let place = place_with(&file(&qkv()));
    place.write("nhd.safetensors", &file(&qkv().into_iter().map(transposed).collect::<Vec<_>>()));
    let rows = |words: &str| {
        let report = place.json(words);
        let mut rows = report["rows"].as_array().unwrap().clone();
        rows.iter_mut().for_each(|row| row["file"] = Value::Null);
        rows
    };
    let schemes = "--json --causal --schemes int8,sage3-nvfp4";
    assert_eq!(
        rows(&format!("accuracy in.safetensors {schemes}")),
        rows(&format!("accuracy nhd.safetensors --layout nhd {schemes}"))
    );
}

#[test]
fn tables_are_for_people() {
    let place = place_with(&file(&qkv()));
    let text = place.succeed("accuracy in.safetensors --schemes int8 --per-head");
    assert!(text.starts_with("in.safetensors · q [1, 4, 33, 16], k [1, 2, 40, 16], f32\n"), "{text}");
    assert!(text.contains("  scheme  computed by    cosine  relative L1"), "{text}");
    assert!(text.contains("int8 (oracle)"), "{text}");
    assert!(!text.contains('\u{1b}'), "colours are for terminals");
}

#[test]
fn bench_reports_stable_names() {
    let place = Place::new();
    let report =
        place.json("bench --shapes 1,2,64,32/24 1,4/2,1x256,32 --reps 2 --json --threads 2 --causal");
    assert_eq!((&report["threads"], &report["reps"]), (&Value::from(2), &Value::from(2)));
    let rows = report["rows"].as_array().unwrap();
    for row in rows {
        for name in ["batch", "heads", "q_len", "kv_len", "head_dim", "value_dim"] {
            assert!(row[name].is_u64(), "{name} of {row}");
        }
        for name in ["median_ms", "min_ms", "max_ms", "gflops", "ratio_to_full_precision"] {
            assert!(row[name].as_f64().unwrap() > 0.0, "{name} of {row}");
        }
        assert_eq!((&row["causal"], &row["dtype"]), (&Value::from(true), &Value::from("f16")));
        assert_eq!(row["peak_memory_bytes"].is_u64(), cfg!(target_os = "linux"), "{row}");
        let decodes = row["q_len"] == 1;
        assert_eq!(
            (row["bandwidth_gbs"].is_f64(), row["bandwidth_fraction"].is_f64()),
            (decodes, decodes),
            "{row}"
        );
    }
    let full: Vec<&Value> = rows.iter().filter(|row| row["scheme"] == "full").collect();
    assert_eq!(full.len(), 2);
    assert!(full.iter().all(|row| row["ratio_to_full_precision"] == 1.0));
    // 2·B·H·Lq·Lk·(D + Dv), halved for causal; one query, aligned at the bottom right, sees every key.
    let operations = [2.0 * 2.0 * 64.0 * 64.0 * (32.0 + 24.0) / 2.0, 4.0 * 4.0 * 256.0 * 32.0];
    for (row, operations) in full.iter().zip(operations) {
        let done = row["gflops"].as_f64().unwrap() * row["median_ms"].as_f64().unwrap() * 1e6;
        assert!((done / operations - 1.0).abs() < 1e-9, "{row}");
    }
}

#[test]
fn bench_combines_lists() {
    let place = Place::new();
    let report = place.json("bench --heads 1,2 --seq 16,32 --head-dim 8 --schemes full --reps 1 --json");
    let shapes: Vec<(u64, u64)> = report["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| (row["heads"].as_u64().unwrap(), row["q_len"].as_u64().unwrap()))
        .collect();
    assert_eq!(shapes, [(1, 16), (1, 32), (2, 16), (2, 32)]);
}

#[test]
fn plots_are_valid_images() {
    let layers = ["a.q", "a.k", "a.v", "b.q", "b.k", "b.v"];
    let layers: Vec<_> =
        layers.iter().zip(1..).map(|(name, seed)| f32s(name, &[1, 2, 24, 8], seed)).collect();
    let place = place_with(&file(&layers));
    place.succeed("accuracy in.safetensors --plot a.png");
    place.succeed("accuracy in.safetensors --plot a.svg --schemes int8");
    place.succeed("bench --shapes 1,1,16,8 --reps 1 --plot b.png --json");
    place.succeed("bench --shapes 1,1,16,8 --reps 1 --plot b.SVG");
    for name in ["a.png", "b.png"] {
        let mut reader = png::Decoder::new(std::io::Cursor::new(place.read(name))).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert!(info.width >= 1200 && info.height >= 800, "{info:?}");
        let ink = pixels.iter().filter(|&&byte| byte < 250).count();
        assert!(ink * 200 > pixels.len(), "{name} is nearly empty");
    }
    for (name, words) in
        [("a.svg", ["Accuracy of quantised attention", "int8"]), ("b.SVG", ["Speed of attention", "full"])]
    {
        let text = String::from_utf8(place.read(name)).unwrap();
        assert!(text.starts_with("<svg ") && text.trim_end().ends_with("</svg>"), "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{name}");
        assert_eq!(text.matches("<text ").count(), text.matches("</text>").count());
    }
}

#[test]
fn explain_and_info_describe() {
    let place = Place::new();
    let text =
        place.succeed("explain --heads 8 --kv-heads 2 --seq 4096 --head-dim 128 --causal --dtype bf16");
    let first =
        "problem     bf16, batch 1, 8 query heads, 2 key heads, 4096 queries × 4096 keys, head_dim 128";
    assert_eq!(text.lines().next(), Some(first));
    let report = place.json("explain --heads 8 --seq 1 --kv-len 100 --head-dim 64 --scheme int8 --json");
    assert_eq!((&report["kv_len"], &report["dtype"]), (&Value::from(100), &Value::from("f16")));
    assert_eq!(report["scheme"], Preset::INT8.scheme(64).to_string());
    let report = place.json("explain --seq 100 --head-dim 192 --value-dim 128 --json");
    assert_eq!((&report["head_dim"], &report["value_dim"]), (&Value::from(192), &Value::from(128)));
    let report = place.json("info --json --threads 3");
    assert_eq!(
        (&report["threads"], &report["architecture"]),
        (&Value::from(3), &Value::from(std::env::consts::ARCH))
    );
    // The GPUs that the driver shows, or why there are none.
    let gpus = report["gpus"].as_array().unwrap();
    assert_eq!(gpus.is_empty(), report["no_gpu"].is_string(), "{report}");
    let text = place.succeed("info");
    assert!(text.contains("backend"));
    let wanted = if gpus.is_empty() { "none: " } else { "cuda:0, " };
    assert!(text.lines().any(|line| line.contains("gpu") && line.contains(wanted)), "{text}");
}

#[test]
fn without_a_command_the_example_is_shown() {
    let place = Place::new();
    let text = place.succeed("");
    for words in ["attention in 8 and 4 bits", "relative L1", "Smoothing", "sageattn run"] {
        assert!(text.contains(words), "{words} not in\n{text}");
    }
    let report = place.json("--json");
    let smoothing = report["smoothing"].as_array().unwrap();
    let gain = |row: &Value| {
        row["relative_l1_without"].as_f64().unwrap() / row["relative_l1_with"].as_f64().unwrap()
    };
    assert!(
        smoothing
            .iter()
            .filter(|row| row["layer"].as_str().unwrap().contains('+'))
            .all(|row| gain(row) > 1.5)
    );
}

#[test]
fn help_has_examples() {
    let place = Place::new();
    for command in ["run", "accuracy", "bench", "sparse", "explain", "tune", "ptx", "emulate", "info"] {
        let text = place.succeed(&format!("{command} --help"));
        assert!(text.contains("Examples:\n") && text.contains(&format!("  sageattn {command}")), "{text}");
    }
    assert!(place.succeed("--help").contains("Exit codes:"));
    assert!(place.succeed("--version").starts_with("sageattn "));
}

/// Whoever reads only the first lines ends the command without a message.
#[cfg(unix)]
#[test]
fn a_closed_pipe_is_no_error() {
    use std::process::{Command, Stdio};
    for args in [
        &["explain", "--heads", "8", "--seq", "64", "--head-dim", "64"][..],
        &["run", "--help"],
        &["info", "--json"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let child = Command::new(env!("CARGO_BIN_EXE_sageattn"))
            .args(args)
            .stdout(writer)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(
            (output.status.code(), String::from_utf8(output.stderr).unwrap().as_str()),
            (Some(0), ""),
            "{args:?}"
        );
    }
}

/// A file that is written anew stays as private as it was, also behind a link.
#[cfg(unix)]
#[test]
fn written_files_keep_their_permissions() {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    let place = place_with(&file(&qkv()));
    symlink("secret.safetensors", place.path("link")).unwrap();
    for (name, words) in [
        ("secret.safetensors", "run in.safetensors -o link"),
        ("a.svg", "accuracy in.safetensors --schemes int8 --plot a.svg"),
        ("b.png", "bench --shapes 1,1,16,8 --reps 1 --json --plot b.png"),
    ] {
        place.write(name, b"before");
        fs::set_permissions(place.path(name), Permissions::from_mode(0o600)).unwrap();
        place.succeed(words);
        assert_ne!(place.read(name), b"before", "{words}");
        let mode = fs::metadata(place.path(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{words}");
    }
    assert!(fs::symlink_metadata(place.path("link")).unwrap().is_symlink());
    assert_eq!(place.names(), ["a.svg", "b.png", "in.safetensors", "link", "secret.safetensors"]);
}
