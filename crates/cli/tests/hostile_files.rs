//! Files that were damaged or made to do harm: reading ends in a result, never in a panic, and takes no more memory
//! than the file has bytes.

#![allow(clippy::unwrap_used)] // the helpers of tests are tests too

mod common;

use common::{file, qkv, raw};
use sageattn_files::qkv_file::{FileError, QkvFile, parse, printable};

/// Everything that a command may do with a file.
fn read(bytes: &[u8]) {
    let use_all = |file: QkvFile<'_>| {
        for name in file.names() {
            let _ = file.tensor(name);
            let _ = file.mask(name);
        }
        for prefix in file.prefixes().unwrap_or_default() {
            let _ = file.load(&prefix);
        }
    };
    let _ = parse(bytes).map(use_all);
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let good = file(&qkv());
    assert!(parse(&good).is_ok());
    for len in 0..good.len().min(600) {
        assert!(parse(&good[..len]).is_err(), "{len} bytes");
    }
    for len in (600..good.len()).step_by(97) {
        assert!(parse(&good[..len]).is_err(), "{len} bytes");
    }
}

#[test]
fn any_byte_of_the_header_may_be_any_other() {
    let good = file(&qkv());
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    for at in 0..header {
        for value in 0..=u8::MAX {
            let mut bad = good.clone();
            bad[at] = value;
            read(&bad);
        }
    }
}

/// Sizes whose sum wraps around to exactly the size of the file.
#[test]
fn sizes_do_not_wrap_around() {
    let size = (1u64 << 61) - 1;
    let mut entries = Vec::new();
    let mut start = 0u64;
    for i in 0..8 {
        entries.push(format!(
            r#""t{i}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{start},{}]}}"#,
            start + size
        ));
        start += size;
    }
    // 8·(2⁶¹ − 1) = 2⁶⁴ − 8: with the 8 bytes in front of the header, and the header's own, the end seems to lie there.
    let bytes = raw(&format!("{{{}}}", entries.join(",")), &[]);
    assert!(matches!(parse(&bytes), Err(FileError::Malformed { .. })));
}

#[test]
fn names_cannot_disturb_a_terminal() {
    assert_eq!(printable("\u{1b}[2Jq\n"), "?[2Jq?");
    assert_eq!(printable(&"x".repeat(1000)).chars().count(), 121);
    let bytes = raw(r#"{"\u001b[2Jq":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#, &[]);
    let error = parse(&bytes).unwrap().prefixes().unwrap_err();
    assert_eq!(error.to_string(), "no tensors \"q\", \"k\" and \"v\" behind one prefix; found ?[2Jq");
}

/// Prefixes come in the order that people count in.
#[test]
fn layers_are_in_natural_order() {
    let layers = ["layer10.", "layer2.", "a.", ""];
    let names: Vec<String> =
        layers.iter().flat_map(|layer| ["q", "k", "v"].map(|name| format!("{layer}{name}"))).collect();
    let entries: Vec<_> = names.iter().map(|name| common::f32s(name, &[1], 1)).collect();
    let bytes = file(&entries);
    assert_eq!(parse(&bytes).unwrap().prefixes().unwrap(), ["", "a.", "layer2.", "layer10."]);
}

#[test]
fn values_survive_any_alignment() {
    let good = file(&qkv());
    let whole = parse(&good).unwrap().load("").unwrap();
    let shifted = [&[0][..], &good].concat();
    assert_eq!(parse(&shifted[1..]).unwrap().load("").unwrap(), whole);
}
