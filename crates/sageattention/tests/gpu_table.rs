//! The cases that every backend runs, on a real GPU. Without a driver the test prints that it is skipped.

#![cfg(feature = "cuda")]

use sage_core::{Alignment, Band, DType, Preset};
use sage_testkit::{Case, OwnedCall, Runner, check_table, gpu, most_refused, table};

#[test]
fn cases_of_every_kind_are_the_oracles() {
    let Some(cuda) = gpu::first("cases_of_every_kind_are_the_oracles") else { return };
    check_table(&cuda, &table(), most_refused(cuda.machine().target));
}

/// Values that are the first channels of keys, in the same memory, as those of a latent cache are.
#[test]
fn values_that_lie_in_keys() {
    let Some(cuda) = gpu::first("values_that_lie_in_keys") else { return };
    let decode = Case { q_len: 1, q_heads: 128, kv_len: 1000, batch: 2, ..Case::default() };
    let causal = Case { q_len: 300, q_heads: 4, kv_len: 300, ..Case::default() };
    let causal = Case { band: Band::causal(Alignment::BottomRight), ..causal };
    for case in [decode, causal] {
        for (head_dim, value_dim) in [(576, 512), (512, 512), (288, 256)] {
            let case = Case { dtype: DType::F16, head_dim, ..case.clone() };
            let call = Case { value_dim: Some(value_dim), ..case.clone() }.build();
            let call = OwnedCall { v: call.k.first_channels(value_dim), ..call };
            let computed = cuda.run(&call, Some(Preset::FULL.scheme(head_dim)));
            let expected = cuda.expected(&call.call(), &computed.scheme);
            let tolerance = cuda.tolerance(case.dtype, &computed.scheme);
            assert_eq!(computed.check(&expected, &tolerance), Ok(()), "{case:?}, values of {value_dim}");
        }
    }
}
