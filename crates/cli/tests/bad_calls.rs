//! Bad files and bad command lines: each ends with its exit code and exactly one line that says what is wrong.

#![allow(clippy::unwrap_used)] // the helpers of tests are tests too

mod common;

use common::{Entry, Place, f32s, file, qkv, raw};
use safetensors::tensor::Dtype;

/// Rows of which something came out differently.
#[derive(Default)]
struct Wrong(Vec<String>);

impl Wrong {
    /// Runs the command, and demands an exit code and that the line is all there is on standard error.
    fn check(&mut self, place: &Place, words: &str, code: i32, line: &str) {
        let output = place.run(words);
        let found = (output.status.code(), String::from_utf8(output.stderr).unwrap());
        let expected = (Some(code), format!("error: {line}\n"));
        if found != expected {
            self.0.push(format!("sageattn {words}\n   found {found:?}\nexpected {expected:?}"));
        }
    }
}

impl Drop for Wrong {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert!(self.0.is_empty(), "\n{}", self.0.join("\n"));
        }
    }
}

/// Tensors q, k and v of 0 bytes each, but for what a row puts in.
fn header(q: &str) -> String {
    let empty = r#"{"dtype":"F32","shape":[0],"data_offsets":[8,8]}"#;
    format!(r#"{{"q":{q},"k":{empty},"v":{empty}}}"#)
}

/// Each of these files is refused by every command that reads one.
fn malformed(rows: &[(Vec<u8>, &str)]) {
    let place = Place::new();
    let mut wrong = Wrong::default();
    for (bytes, message) in rows {
        place.write("in.safetensors", bytes);
        let line = format!("in.safetensors: not a valid safetensors file: {message}");
        wrong.check(&place, "run in.safetensors -o out.safetensors", 1, &line);
        wrong.check(&place, "accuracy in.safetensors", 1, &line);
    }
    assert_eq!(place.names(), ["in.safetensors"]);
}

/// A file with such an entry for q.
fn with_q(q: &str) -> Vec<u8> {
    raw(&header(q), &[0; 8])
}

#[test]
fn broken_files() {
    let good = file(&qkv());
    malformed(&[
        (vec![], "file: found 0 bytes, expected at least 8"),
        (vec![1, 2, 3], "file: found 3 bytes, expected at least 8"),
        (good[..7].to_vec(), "file: found 7 bytes, expected at least 8"),
        (
            good[..20].to_vec(),
            "header: found 208 bytes, expected at most the 12 bytes that the file has left",
        ),
        (
            good[..good.len() - 1].to_vec(),
            "tensor \"v\": found data_offsets [13568, 18688], expected rising offsets within the 18687 bytes \
             of data",
        ),
        (
            [&good[..], b"tail"].concat(),
            "tensors: found an end at data byte 18688, expected 18692, the end of the file",
        ),
        (
            u64::MAX.to_le_bytes().to_vec(),
            "header: found 18446744073709551615 bytes, expected at most the 0 bytes that the file has left",
        ),
        (
            [&(1u64 << 40).to_le_bytes()[..], b"{}"].concat(),
            "header: found 1099511627776 bytes, expected at most the 2 bytes that the file has left",
        ),
    ]);
}

#[test]
fn headers_that_are_no_json() {
    let mut not_utf8 = raw(r#"{"q    ":1}"#, &[]);
    not_utf8[11] = 0xff;
    malformed(&[
        (
            raw("", &[]),
            "header: found invalid JSON (EOF while parsing a value at line 1 column 0), expected a JSON \
             object of tensors",
        ),
        (
            raw("not JSON", &[]),
            "header: found invalid JSON (expected ident at line 1 column 2), expected a JSON object of tensors",
        ),
        (
            raw("[1, 2]", &[]),
            "header: found invalid JSON (invalid type: sequence, expected an object at line 1 column 0), \
             expected a JSON object of tensors",
        ),
        (
            not_utf8,
            "header: found invalid JSON (invalid unicode code point at line 1 column 4), expected a JSON \
             object of tensors",
        ),
        (
            raw(&"[".repeat(100_000), &[]),
            "header: found invalid JSON (invalid type: sequence, expected an object at line 1 column 0), \
             expected a JSON object of tensors",
        ),
        (
            raw(r#"{"q":7}"#, &[]),
            "header: found invalid JSON (invalid type: integer `7`, expected an object with dtype, shape and \
             data_offsets at line 1 column 6), expected a JSON object of tensors",
        ),
        (
            raw(r#"{"q":{"dtype":"F32","shape":[2]}}"#, &[]),
            "header: found invalid JSON (missing field `data_offsets` at line 1 column 32), expected a JSON \
             object of tensors",
        ),
        (
            with_q(r#"{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}"#),
            "header: found invalid JSON (invalid value: integer `-2`, expected u64 at line 1 column 31), \
             expected a JSON object of tensors",
        ),
        (
            with_q(&[r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#; 2].join(r#","q":"#)),
            "header: found invalid JSON (tensor \"q\" occurs twice at line 1 column 57), expected a JSON \
             object of tensors",
        ),
    ]);
}

#[test]
fn headers_that_contradict_themselves() {
    malformed(&[
        (
            with_q(r#"{"dtype":"F33","shape":[2],"data_offsets":[0,8]}"#),
            "tensor \"q\": found dtype F33, expected a dtype of the safetensors format",
        ),
        (
            with_q(r#"{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#),
            "tensor \"q\": found 8 bytes of data, expected 12 for F32 [3]",
        ),
        (
            with_q(r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#),
            "tensor \"q\": found data_offsets [8, 0], expected rising offsets within the 8 bytes of data",
        ),
        (
            with_q(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,9]}"#),
            "tensor \"q\": found data_offsets [0, 9], expected rising offsets within the 8 bytes of data",
        ),
        (
            with_q(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#),
            "tensor \"q\": found a start at data byte 4, expected 0, the end of the tensor before",
        ),
        (
            with_q(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#),
            "tensor \"k\": found a start at data byte 8, expected 4, the end of the tensor before",
        ),
        (
            with_q(r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}"#),
            "tensor \"q\": found F32 [4294967296, 4294967296], expected whole bytes, fewer than 2⁶⁴ bits",
        ),
        (
            with_q(r#"{"dtype":"F4","shape":[3],"data_offsets":[0,8]}"#),
            "tensor \"q\": found F4 [3], expected whole bytes, fewer than 2⁶⁴ bits",
        ),
        (
            with_q(r#"{"dtype":"F32","shape":[4611686018427387904,8,0],"data_offsets":[0,8]}"#),
            "tensor \"q\": found 8 bytes of data, expected 0 for F32 [4611686018427387904, 8, 0]",
        ),
        (
            with_q(r#"{"dtype":"U8","shape":[8,1,1,1,1,1,1,1,1],"data_offsets":[0,8]}"#),
            "tensor \"q\": found 9 dimensions, expected at most 8",
        ),
    ]);
}

#[test]
fn tensors_that_do_not_serve() {
    let place = Place::new();
    let mut wrong = Wrong::default();
    let replaced = |entry: Entry<'static>| {
        let mut entries = qkv();
        entries.retain(|(name, ..)| *name != entry.0);
        entries.push(entry);
        file(&entries)
    };
    let integers = |name, len: usize| (name, Dtype::I64, vec![len], vec![0; 8 * len]);
    let rows: Vec<(Vec<u8>, &str, &str)> = vec![
        (file(&[]), "", "no tensors \"q\", \"k\" and \"v\" behind one prefix; found no tensor at all"),
        (file(&qkv()[..2]), "", "no tensors \"q\", \"k\" and \"v\" behind one prefix; found k, q"),
        (
            file(&[f32s("a.q", &[2], 1), f32s("b.k", &[2], 1), f32s("a.v", &[2], 1)]),
            "",
            "no tensors \"q\", \"k\" and \"v\" behind one prefix; found a.q, a.v, b.k",
        ),
        (file(&qkv()), "--prefix layer9.", "no tensor named \"layer9.q\"; found k, q, v"),
        (file(&qkv()), "--mask padding", "no tensor named \"padding\"; found k, q, v"),
        (replaced(integers("q", 4)), "", "tensor \"q\": dtype is I64, expected F32, F16 or BF16"),
        (
            file(&[qkv(), vec![integers("m", 40)]].concat()),
            "--mask m",
            "tensor \"m\": dtype is I64, expected BOOL, U8, F32, F16 or BF16 for a mask",
        ),
        (
            replaced(f32s("v", &[1, 1, 2, 40, 16], 1)),
            "",
            "tensor \"v\": shape is [1, 1, 2, 40, 16], expected at most 4 dimensions",
        ),
        (
            replaced(("q", Dtype::F32, vec![0, 1 << 62, 1, 8], vec![])),
            "",
            "tensor \"q\": shape is [0, 4611686018427387904, 1, 8], expected less than 2⁶³ elements, where a \
             size of 0 counts as 1",
        ),
        (
            replaced(f32s("q", &[33, 16], 1)),
            "",
            "q: shape is [33, 16], expected [batch, heads, seq, head_dim]",
        ),
        (replaced(f32s("k", &[2, 2, 40, 16], 1)), "", "k: shape is [2, 2, 40, 16], expected batch 1, as q"),
        (
            replaced(f32s("q", &[1, 3, 33, 16], 1)),
            "",
            "k: shape is [1, 2, 40, 16], expected a number of heads that divides q's 3",
        ),
        (replaced(f32s("q", &[1, 4, 33, 577], 1)), "", "head_dim: value is 577, expected 1 to 576"),
        (replaced(f32s("q", &[1, 4, 33, 0], 1)), "", "head_dim: value is 0, expected 1 to 576"),
        (
            replaced(f32s("v", &[1, 2, 39, 16], 1)),
            "",
            "v: shape is [1, 2, 39, 16], expected [1, 2, 40, head_dim], as k",
        ),
        (
            replaced(("k", Dtype::F16, vec![1, 2, 40, 16], vec![0; 2560])),
            "",
            "k: dtype is f16, expected f32, as q",
        ),
        (
            file(&qkv()),
            "--layout nhd",
            "k: shape is [1, 2, 40, 16], expected a number of heads that divides q's 33",
        ),
        (file(&qkv()), "--sm-scale nan", "sm_scale: value is NaN, expected a finite number above 0"),
        (file(&qkv()), "--sm-scale -1", "sm_scale: value is -1, expected a finite number above 0"),
        (file(&qkv()), "--softcap 0", "logit_softcap: value is 0, expected a finite number above 0"),
        (file(&qkv()), "--kv-lens 41", "kv_lens[0]: value is 41, expected 0 to 40, k's length"),
        (file(&qkv()), "--kv-lens -1", "kv_lens[0]: value is -1, expected 0 to 40, k's length"),
        (file(&qkv()), "--kv-lens 3,4", "kv_lens: shape is [2], expected [1], one for each batch entry"),
        (
            file(&[qkv(), vec![f32s("m", &[33, 39], 1)]].concat()),
            "--mask m",
            "mask: shape is [33, 39], expected broadcastable to [1, 4, 33, 40]",
        ),
        (
            file(&[qkv(), vec![("m", Dtype::BOOL, vec![1, 1, 1, 33, 40], vec![1; 1320])]].concat()),
            "--mask m",
            "mask: shape is [1, 1, 1, 33, 40], expected at most 4 dimensions",
        ),
    ];
    for (bytes, words, message) in rows {
        place.write("in.safetensors", &bytes);
        let line = format!("in.safetensors: {message}");
        wrong.check(&place, &format!("run in.safetensors -o out.safetensors {words}"), 1, &line);
    }
    let layers = [("b.q", 4), ("b.k", 4), ("b.v", 3)].map(|(name, rows)| f32s(name, &[1, 1, rows, 16], 1));
    place.write("in.safetensors", &file(&layers));
    let line = "in.safetensors: b.: v: shape is [1, 1, 3, 16], expected [1, 1, 4, head_dim], as k";
    wrong.check(&place, "run in.safetensors -o out.safetensors", 1, line);
    wrong.check(&place, "accuracy in.safetensors", 1, line);
    assert_eq!(place.names(), ["in.safetensors"]);
}

#[test]
fn files_that_cannot_be_opened() {
    let place = Place::new();
    let mut wrong = Wrong::default();
    place.write("in.safetensors", &file(&qkv()));
    std::fs::create_dir(place.path("dir")).unwrap();
    // What the system says of such a file, each in its own words.
    let read = |name: &str| std::fs::read(place.path(name)).unwrap_err();
    let written = |name: &str| std::fs::File::create(place.path(name)).unwrap_err();
    let (missing, folder) = (read("none.safetensors"), read("dir"));
    let (nowhere, below_a_file) = (written("none/out"), written("in.safetensors/out"));
    for (words, line) in [
        ("run none.safetensors -o out.safetensors", format!("none.safetensors: cannot be read: {missing}")),
        ("run dir -o out.safetensors", format!("dir: cannot be read: {folder}")),
        (
            "run in.safetensors -o none/out.safetensors",
            format!("none/out.safetensors: cannot be written: {nowhere}"),
        ),
        ("run in.safetensors -o dir", "dir: cannot be written: is a directory".to_owned()),
        (
            "run in.safetensors -o in.safetensors/out",
            format!("in.safetensors/out: cannot be written: {below_a_file}"),
        ),
        ("accuracy none.safetensors", format!("none.safetensors: cannot be read: {missing}")),
        (
            "accuracy in.safetensors --json --schemes full --plot none/a.png",
            format!("none/a.png: cannot be written: {nowhere}"),
        ),
    ] {
        wrong.check(&place, words, 1, &line);
    }
    // Nothing half-written is left behind.
    assert_eq!(place.names(), ["dir", "in.safetensors"]);
}

#[test]
fn command_lines() {
    let place = Place::new();
    let mut wrong = Wrong::default();
    place.write("in.safetensors", &file(&qkv()));
    let names: Vec<&str> = sageattention::Preset::ALL.iter().map(|preset| preset.name()).collect();
    let scheme = format!(
        "invalid value 'sage9' for '--scheme <NAME>': not a scheme; those with names: {} (see --help)",
        names.join(", ")
    );
    wrong.check(&place, "run in.safetensors -o out --scheme sage9", 2, &scheme);
    let schemes = scheme.replace("--scheme <NAME>", "--schemes <NAME,…>");
    wrong.check(&place, "accuracy in.safetensors --schemes int8,sage9", 2, &schemes);
    // The backend's own choice has nothing that defines it.
    let auto = schemes.replace("'sage9'", "'auto'");
    wrong.check(&place, "accuracy in.safetensors --schemes auto", 2, &auto);
    let window = |value: &str| {
        format!(
            "invalid value '{value}' for '--window <L,R>': expected two numbers L,R of at least 0, or \"any\" \
             for no limit, such as 128,0 (see --help)"
        )
    };
    for value in ["3", "a,b", "-2,0", "1,2,3", ","] {
        wrong.check(&place, &format!("run in.safetensors -o out --window {value}"), 2, &window(value));
    }
    let shape = |value: &str| {
        format!(
            "invalid value '{value}' for '--shapes <B,H,S,D>...': expected batch,heads,seq,head_dim such as \
             1,8,1024,64 or 1,32/8,1x4096,192/128 (see --help)"
        )
    };
    for value in ["1,2,3", "1,2,3,4,5", "1,2,3,x", "1,2/,3,4"] {
        wrong.check(&place, &format!("bench --shapes {value}"), 2, &shape(value));
    }
    for (words, line) in [
        ("fly", "unrecognized subcommand 'fly' (see --help)"),
        ("run", "the following required arguments were not provided: --output <OUT> <IN> (see --help)"),
        (
            "run in.safetensors",
            "the following required arguments were not provided: --output <OUT> (see --help)",
        ),
        (
            "run in.safetensors -o out --causal=left",
            "invalid value 'left' for '--causal[=<ALIGNMENT>]' [possible values: bottom-right, top-left] (see \
             --help)",
        ),
        (
            "run in.safetensors -o out --layout hdn",
            "invalid value 'hdn' for '--layout <LAYOUT>' [possible values: hnd, nhd] (see --help)",
        ),
        (
            "run in.safetensors -o out --sm-scale x",
            "invalid value 'x' for '--sm-scale <X>': invalid float literal (see --help)",
        ),
        (
            "run in.safetensors -o out --sm-scale 1e-46",
            "invalid value '1e-46' for '--sm-scale <X>': single precision makes 0 of it, expected 1e-45 to \
             3.4e38 (see --help)",
        ),
        (
            "run in.safetensors -o out --sm-scale 0.1e-400",
            "invalid value '0.1e-400' for '--sm-scale <X>': single precision makes 0 of it, expected 1e-45 to \
             3.4e38 (see --help)",
        ),
        (
            "accuracy in.safetensors --softcap 1e39",
            "invalid value '1e39' for '--softcap <X>': single precision makes inf of it, expected 1e-45 to \
             3.4e38 (see --help)",
        ),
        (
            "run in.safetensors -o out --kv-lens 1,x",
            "invalid value 'x' for '--kv-lens <N,…>': invalid digit found in string (see --help)",
        ),
    ] {
        wrong.check(&place, words, 2, line);
    }
    assert_eq!(place.names(), ["in.safetensors"]);
}

#[test]
fn command_lines_without_a_file() {
    let place = Place::new();
    let mut wrong = Wrong::default();
    for (words, line) in [
        (
            "run in.safetensors -o out --threads 0",
            "invalid value '0' for '--threads <N>': 0 is not in 1..=1024 (see --help)",
        ),
        (
            "run in.safetensors -o out --cuasal",
            "unexpected argument '--cuasal' found; a similar argument exists: '--causal' (see --help)",
        ),
        ("accuracy", "the following required arguments were not provided: <IN>... (see --help)"),
        (
            "accuracy in.safetensors --plot a.gif",
            "--plot: file is a.gif, expected a name ending in .png or .svg",
        ),
        (
            "bench --dtype int8",
            "invalid value 'int8' for '--dtype <DTYPE>' [possible values: f32, f16, bf16] (see --help)",
        ),
        ("bench --reps 0", "invalid value '0' for '--reps <REPS>': 0 is not in 1..=100000 (see --help)"),
        (
            "bench --shapes 1,8,64,64 --seq 3",
            "the argument '--shapes <B,H,S,D>...' cannot be used with '--seq <N,…>' (see --help)",
        ),
        ("bench --plot a", "--plot: file is a, expected a name ending in .png or .svg"),
        (
            "explain --heads 8 --seq 64 --head-dim 577",
            "invalid value '577' for '--head-dim <N>': 577 is not in 1..=576 (see --help)",
        ),
        (
            "explain --heads 8 --seq 64 --head-dim 0",
            "invalid value '0' for '--head-dim <N>': 0 is not in 1..=576 (see --help)",
        ),
        (
            "explain --heads x",
            "invalid value 'x' for '--heads <N>': invalid digit found in string (see --help)",
        ),
    ] {
        wrong.check(&place, words, 2, line);
    }
}

#[test]
fn problems_that_cannot_be() {
    let place = Place::new();
    let mut wrong = Wrong::default();
    for (words, line) in [
        (
            "explain --heads 8 --kv-heads 3 --seq 64 --head-dim 64",
            "k: shape is [1, 3, 64, 64], expected a number of heads that divides q's 8",
        ),
        (
            "explain --heads 8 --seq 18446744073709551615 --head-dim 64",
            "q: shape is [1, 8, 18446744073709551615, 64], expected less than 2⁶³ elements, where a size of 0 \
             counts as 1",
        ),
        (
            "explain --heads 8 --seq 64 --head-dim 64 --softcap inf",
            "logit_softcap: value is inf, expected a finite number above 0",
        ),
        ("bench --shapes 1,8,64,600", "shape 1,8,64,600: head_dim: value is 600, expected 1 to 576"),
        (
            "bench --shapes 1,8/3,64,64",
            "shape 1,8/3,64,64: k: shape is [1, 3, 64, 64], expected a number of heads that divides q's 8",
        ),
        (
            "bench --shapes 4294967296,4294967296,64,64",
            "shape 4294967296,4294967296,64,64: tensor: shape is [4294967296, 4294967296, 64, 64], expected \
             less than 2⁶³ elements, where a size of 0 counts as 1",
        ),
        (
            "bench --shapes 1048576,1048576,64,64",
            "shape 1048576,1048576,64,64: a tensor of shape [1048576, 1048576, 64, 64] is not supported: no \
             memory for 4503599627370496 numbers",
        ),
    ] {
        wrong.check(&place, words, 1, line);
    }
}
