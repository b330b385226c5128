//! Bytes from strangers as a file of queries, keys and values: whatever they are, an error or tensors, never a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sageattn_files::qkv_file::{MaskTensor, parse};

fuzz_target!(|bytes: &[u8]| {
    let file = match parse(bytes) {
        Ok(file) => file,
        Err(error) => return one_line(&error.to_string()),
    };
    for name in file.names() {
        match file.tensor(name) {
            // No more than the file holds: a short file cannot make a reader allocate much.
            Ok(tensor) => assert!(tensor.to_f32_vec().len() * tensor.dtype().bytes() <= bytes.len()),
            Err(error) => one_line(&error.to_string()),
        }
        match file.mask(name) {
            Ok(MaskTensor::Bool { visible, shape }) => {
                assert_eq!(visible.len(), shape.iter().product::<usize>());
                assert!(visible.len() <= bytes.len());
            }
            Ok(MaskTensor::Additive(_)) => {}
            Err(error) => one_line(&error.to_string()),
        }
    }
    match file.prefixes() {
        Ok(prefixes) => {
            for prefix in prefixes {
                match file.load(&prefix) {
                    Ok(qkv) => assert_eq!(qkv.prefix, prefix),
                    Err(error) => one_line(&error.to_string()),
                }
            }
        }
        Err(error) => one_line(&error.to_string()),
    }
});

/// A message that quotes a file must not smuggle line breaks or terminal codes into a log.
fn one_line(message: &str) {
    assert!(!message.is_empty() && !message.chars().any(char::is_control), "message is {message:?}");
}
