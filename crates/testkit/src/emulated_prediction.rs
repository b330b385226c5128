//! Predictions by the GPU's kernels in the emulator.

use sage_core::Geometry;
use sage_core::sparse::{PaddedBlocks, PerHead, Select};
use sage_emulator::Emulator;
use sage_kernels::predict::{LengthLists, PredictCall, PredictTensors};
use sage_kernels::{Lengths, TensorArg};

use crate::emulator::Launches;
use crate::{Emulated, Memory, Prediction, Sequences};

impl Emulated {
    /// The bytes of a predicted map.
    pub fn predict(&self, case: &Prediction) -> Vec<u8> {
        let mut emulator = Emulator::new();
        let tensors = case.tensors();
        let checked = case.call(&tensors);
        let row = case.head_dim + case.gap;
        let aligned = case.head_dim.is_multiple_of(8) && row.is_multiple_of(8);
        let mut tensor = |name: &str, memory: &Memory, geometry: &Geometry| {
            // Rows that are not aligned begin anywhere, and what is empty has no memory.
            let offset = if aligned { 0 } else { 2 };
            let address = match memory.is_empty() || geometry.is_empty() {
                true => 0,
                false => emulator.buffer_at(name, memory.half_bits(), offset).address(),
            };
            TensorArg { address, strides: std::array::from_fn(|i| geometry.strides()[i]) }
        };
        let q = tensor("q", &tensors[0], checked.q.geometry());
        let k = tensor("k", &tensors[1], checked.k.geometry());
        let lengths = match &case.sequences {
            Sequences::Dense | Sequences::Staggered => Lengths::Dense,
            Sequences::KvLens(_) => Lengths::KvLens,
            Sequences::Packed(..) => Lengths::Packed,
        };
        let mut problem = checked.problem;
        if let (Some([q_len, kv_len]), Lengths::Packed) = (self.longest, lengths) {
            (problem.q_len, problem.kv_len) = (problem.q_len.min(q_len), problem.kv_len.min(kv_len));
        }
        let call = PredictCall {
            lengths,
            q_rows: checked.q.shape()[2],
            kv_rows: checked.k.shape()[2],
            aligned,
            padded_keys: case.predictor.k_padding.is_some(),
            ..PredictCall::new(&problem)
        };
        let pass = call.pass(&case.predictor).unwrap_or_else(|error| panic!("{error}: {case:?}"));
        let bytes: usize = case.predictor.shape(&problem).iter().product();
        let map = emulator.uninitialized("map", bytes.max(1));
        let mut each = |name: &str, number: Option<&PerHead>| match number {
            Some(PerHead::Each(numbers)) => emulator.buffer(name, numbers).address(),
            _ => 0,
        };
        let (top_share, amount) = match &case.predictor.select {
            Select::TopK(share) => (Some(share), None),
            Select::Cdf(amount) | Select::Sigmas(amount) => (None, Some(amount)),
            Select::TopKTopP { k, p } => (Some(k), Some(p)),
            _ => (None, None),
        };
        let mut tensors = PredictTensors {
            q,
            k,
            top_share: each("top_share", top_share),
            amount: each("amount", amount),
            similarity: each("similarity", case.predictor.similarity.as_ref()),
            map: map.address(),
            ..PredictTensors::default()
        };
        let mut integers = |name: &str, values: Option<Vec<i32>>| {
            values.map_or(0, |values| emulator.buffer(name, &values).address())
        };
        let (queries, keys) = match &case.sequences {
            Sequences::Dense | Sequences::Staggered => (None, None),
            Sequences::KvLens(kv_lens) => (None, Some(kv_lens.clone())),
            Sequences::Packed(q, k) => (Some(q.clone()), Some(k.clone())),
        };
        tensors.lengths =
            LengthLists { queries: integers("cu_seqlens_q", queries), keys: integers("cu_seqlens_k", keys) };
        let sizes = |padding: &Option<PaddedBlocks>| {
            padding.as_ref().map(|padding| padding.sizes().iter().map(|&size| size as i32).collect())
        };
        tensors.q_sizes = integers("q_sizes", sizes(&case.predictor.q_padding));
        tensors.k_sizes = integers("k_sizes", sizes(&case.predictor.k_padding));
        let workspace = emulator.uninitialized("workspace", pass.workspace_bytes().max(1));
        assert_eq!(pass.zeroed_bytes(), 0, "{case:?}");
        let (programs, kernels) = (pass.programs(self.machine.target), pass.kernel_names());
        let mut launcher = Launches { emulator: &mut emulator, programs: &programs, folded: self.folded };
        pass.run(&tensors, workspace.address(), &mut launcher)
            .unwrap_or_else(|failure| panic!("{kernels:?}, {case:?}\n{failure}"));
        if bytes == 0 { Vec::new() } else { emulator.read(map) }
    }
}
