//! Some of the random calls that `gpu_random.rs` makes, by the emulator: with every check that a GPU lacks.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "tests")]

mod random_calls;

use random_calls::{Computed, Memory, RandomCall, RandomLengths, RandomMask, check, count, presets};
use sage_core::{Call, Error, Geometry};
use sage_emulator::{Emulator, Failure};
use sage_kernels::Lengths;
use sage_kernels::attention::MaskForm;
use sage_kernels::forward::{ForwardPlan, Request, Tensors};
use sage_kernels::pass::Launcher;
use sage_kernels::{Machine, TensorArg};
use sage_ptx::{Arg, BoxedTensor, Program, Target};

/// Most rows of a sequence: the emulator takes its time.
const MOST_ROWS: usize = 150;

struct Emulated<'a> {
    emulator: &'a mut Emulator,
    programs: &'a [Program],
}

impl Launcher for Emulated<'_> {
    type Error = Failure;

    fn tensor_map(&mut self, tensor: &BoxedTensor) -> Result<Arg, Failure> {
        // As the driver refuses.
        assert!(tensor.address != 0 && !tensor.shape.contains(&0), "{tensor:?}");
        Ok(self.emulator.tensor_map(&tensor.into()))
    }

    fn launch(&mut self, kernel: usize, grid: [u32; 3], args: &[Arg]) -> Result<(), Failure> {
        self.emulator.launch(&self.programs[kernel], grid, args).map(|_| ())
    }
}

/// Computes a call, or says what no kernel computes.
fn run(call: &RandomCall, gpu: &Machine) -> Result<Computed, Error> {
    let inputs = call.inputs();
    let checked = Call::check(&inputs, &call.options)?;
    let problem = &checked.problem;
    let mut emulator = Emulator::new();
    let mut tensor = |name: &str, memory: &Memory, geometry: &Geometry| {
        let buffer = (!memory.bits.is_empty()).then(|| emulator.buffer(name, &memory.bits));
        // What is empty has no memory.
        let address = buffer
            .filter(|_| !geometry.is_empty())
            .map_or(0, |buffer| buffer.address().wrapping_add_signed(2 * geometry.index([0; 4])));
        let strides = std::array::from_fn(|i| geometry.strides()[i]);
        (buffer, TensorArg { address, strides })
    };
    let (_, q) = tensor("q", &call.q, checked.q.geometry());
    let (_, k) = tensor("k", &call.k, checked.k.geometry());
    let (_, v) = tensor("v", &call.v, checked.v.geometry());
    let (out_buffer, out) =
        tensor("out", &call.out, &checked.check_output(call.out.dtype, &call.out.geometry)?);
    let mask_address = call.mask.as_ref().map_or(0, |mask| match mask {
        RandomMask::Bool(visible, _) => {
            let bytes: Vec<u8> = visible.iter().map(|&x| u8::from(x)).collect();
            emulator.buffer("mask", &bytes).address()
        }
        RandomMask::F32(bias, _) => emulator.buffer("mask", bias).address(),
        RandomMask::Halves(memory) => emulator.buffer("mask", &memory.bits).address(),
    });
    let mask_strides =
        checked.mask.map_or([0; 4], |mask| std::array::from_fn(|i| mask.geometry().strides()[i]));
    let (cu_q, cu_k) = match &call.lengths {
        RandomLengths::Dense => (None, None),
        RandomLengths::KvLens(lens) => (None, Some(lens)),
        RandomLengths::Packed(q, k) => (Some(q), Some(k)),
    };
    let mut list =
        |values: Option<&Vec<i32>>| values.map_or(0, |list| emulator.buffer("lengths", list).address());
    let (cu_seqlens_q, cu_seqlens_k) = (list(cu_q), list(cu_k));
    let lse = emulator.uninitialized("lse", 4 * checked.lse_shape().iter().product::<usize>());
    let tensors = Tensors {
        q,
        k,
        v,
        out,
        lse: if call.lse { lse.address() } else { 0 },
        mask: (mask_address, mask_strides),
        cu_seqlens_q,
        cu_seqlens_k,
    };
    let aligned = tensors.aligned(problem.head_dim);
    let request = Request {
        scheme: call.preset.map(|preset| preset.scheme(problem.head_dim)),
        accuracy: None,
        mask: match &call.mask {
            None => MaskForm::None,
            Some(RandomMask::Bool(..)) => MaskForm::Bool,
            Some(RandomMask::F32(..)) => MaskForm::Bias(sage_core::DType::F32),
            Some(RandomMask::Halves(memory)) => MaskForm::Bias(memory.dtype),
        },
        lengths: match &call.lengths {
            RandomLengths::Dense => Lengths::Dense,
            RandomLengths::KvLens(_) => Lengths::KvLens,
            RandomLengths::Packed(..) => Lengths::Packed,
        },
        q_rows: checked.q.shape()[2],
        kv_rows: checked.k.shape()[2],
        aligned,
        has_tensor_map: aligned
            && tensors.k.has_map(checked.k.shape())
            && tensors.v.has_map(checked.v.shape()),
        lse: call.lse,
        tiling: None,
    };
    let forward = ForwardPlan::new(problem, &request, gpu)?;
    let workspace = emulator.uninitialized("workspace", forward.pass().workspace_bytes().max(1));
    emulator.write(workspace, &vec![0u8; forward.pass().zeroed_bytes()]);
    let programs = forward.pass().programs();
    let mut launcher = Emulated { emulator: &mut emulator, programs: &programs };
    forward
        .pass()
        .run(&tensors, workspace.address(), &mut launcher)
        .unwrap_or_else(|failure| panic!("{call:?}, {:?}\n{failure}", forward.pass().kernel_names()));
    Ok(Computed {
        scheme: *forward.scheme(),
        out: out_buffer.map_or_else(Vec::new, |buffer| emulator.read(buffer)),
        lse: call.lse.then(|| emulator.read(lse)),
    })
}

#[test]
fn random_calls_agree_with_the_oracle() {
    // Hopper has the most kinds of kernels.
    let targets = [Target::SM_90A, Target::SM_80, Target::SM_90A, Target::SM_89, Target::SM_90A];
    let (mut computed, mut worst) = (0, [0f64; 2]);
    let count = count(80);
    for number in 0..count {
        let gpu = Machine {
            multiprocessors: 7 + number % 60,
            ..Machine::typical(targets[number / 4 % targets.len()])
        };
        let call = RandomCall::new(number, MOST_ROWS, &presets(&gpu));
        match run(&call, &gpu) {
            Ok(result) => {
                let found = check(&call, &result);
                worst = [worst[0].max(found.of_scheme), worst[1].max(found.of_exact)];
                computed += 1;
            }
            Err(refused) => eprintln!("{call:?}: not computed: {refused}"),
        }
    }
    eprintln!(
        "{computed} of {count} calls computed; worst error {:.2} and {:.2} of what is allowed",
        worst[0], worst[1]
    );
    assert!(computed * 10 >= count * 9, "{computed} of {count}");
}
