//! Attention sinks, as users give them: beside the oracle, over a KV cache, and what is refused. Without a driver the
//! tests of a GPU print that they are skipped.

#![allow(clippy::unwrap_used)] // the helpers of tests are tests too

use sage_core::metrics::Accuracy;
use sage_core::{Call, Inputs, oracle};
use sage_testkit::normal_tensor;
use sageattention::{Attention, DType, KvCacheOptions, Preset, Tensor, TensorView, View};

const SINKS: [f32; 6] = [-2.0, 1.0, 4.0, f32::NEG_INFINITY, 7.0, 30.0];

fn normal(seed: u64, shape: &[usize], dtype: DType) -> Tensor {
    normal_tensor(seed, shape, dtype)
}

fn view(sinks: &[f32]) -> TensorView<'_> {
    TensorView::F32(View::contiguous("sinks", sinks, &[sinks.len()]).unwrap())
}

/// Exact attention with the sinks.
fn exact(attention: &Attention<'_>, [q, k, v]: [&Tensor; 3]) -> oracle::Output {
    let inputs = Inputs::new(q.view(), k.view(), v.view()).sinks(view(&SINKS));
    oracle::exact(&Call::check(&inputs, &attention.options()).unwrap())
}

#[test]
fn sinks_reach_the_backend_as_a_list_and_as_a_tensor() {
    let (q, k, v) = (
        normal(1, &[2, 6, 33, 64], DType::F32),
        normal(2, &[2, 2, 47, 64], DType::F32),
        normal(3, &[2, 2, 47, 64], DType::F32),
    );
    let list = SINKS.to_vec();
    for new in [Attention::new(), Attention::new().causal(true), Attention::new().logit_softcap(3.0)] {
        let attention = new.return_lse(true).scheme(Preset::FULL);
        let expected = exact(&attention, [&q, &k, &v]);
        for attention in [
            attention.clone().sinks(&SINKS[..]),
            attention.clone().sinks(&list),
            attention.sinks(view(&SINKS)),
        ] {
            let output = attention.forward(&q, &k, &v).unwrap();
            let accuracy = Accuracy::of(&output.out.to_f32_vec(), &expected.out);
            assert!(accuracy.max_abs_error < 1e-5, "{attention:?}: {accuracy}");
            let accuracy = Accuracy::of(&output.lse.unwrap().to_f32_vec(), &expected.lse);
            assert!(accuracy.max_abs_error < 1e-4, "{attention:?}: LSE {accuracy}");
        }
    }
    let plan = Attention::new().sinks(&SINKS[..]).plan(&q, &k, &v).unwrap().to_string();
    assert!(plan.contains("a sink for each head"), "{plan}");
}

#[test]
fn a_cache_has_them_too() {
    let (q, k, v) = (
        normal(1, &[2, 6, 5, 64], DType::F32),
        normal(2, &[2, 2, 700, 64], DType::F32),
        normal(3, &[2, 2, 700, 64], DType::F32),
    );
    let mut cache = KvCacheOptions::new(2, 64).sequences(2).build().unwrap();
    cache.append(&k, &v).unwrap();
    let attention = Attention::new().causal(true).return_lse(true);
    let expected = exact(&attention, [&q, &k, &v]);
    let found = cache.attend(&q, &attention.sinks(&SINKS[..])).unwrap();
    let accuracy = Accuracy::of(&found.out.to_f32_vec(), &expected.out);
    assert!(accuracy.relative_l1 < 0.01, "{accuracy}");
    let accuracy = Accuracy::of(&found.lse.unwrap().to_f32_vec(), &expected.lse);
    assert!(accuracy.max_abs_error < 0.02, "LSE {accuracy}");
}

#[test]
fn what_is_wrong_is_named() {
    let zeros = Tensor::zeros(DType::F32, &[1, 2, 3, 16]).unwrap();
    let text = |attention: &Attention<'_>| {
        attention.forward(&zeros, &zeros, &zeros).map(drop).unwrap_err().to_string()
    };
    assert_eq!(
        text(&Attention::new().sinks(&SINKS[..])),
        "sinks: shape is [6], expected [2], one for each query head"
    );
    assert_eq!(
        text(&Attention::new().sinks(&[0.0, f32::NAN][..])),
        "sinks[1]: value is NaN, expected a number, or -inf for none"
    );
    assert_eq!(
        text(&Attention::new().sinks(&[f32::INFINITY, 0.0][..])),
        "sinks[0]: value is inf, expected a number, or -inf for none"
    );
    let half = Tensor::zeros(DType::F16, &[2]).unwrap();
    assert_eq!(text(&Attention::new().sinks(half.view())), "sinks: dtype is f16, expected f32");
}

#[cfg(feature = "cuda")]
mod on_a_gpu {
    use half::f16;
    use sage_testkit::gpu;
    use sageattention::Device;
    use sageattention::cuda::{Buffer, CudaTensor, DeviceLse};

    use super::*;

    fn numbers(tensor: &CudaTensor) -> Vec<f32> {
        tensor.buffer().to_vec::<f16>().unwrap().into_iter().map(f16::to_f32).collect()
    }

    #[test]
    fn they_lie_in_its_memory_and_are_read_when_a_graph_is_replayed() {
        let Some(cuda) = gpu::first("they_lie_in_its_memory") else { return };
        let stream = cuda.stream().unwrap();
        let [q, k, v] =
            [[1, 6, 300, 64], [1, 2, 300, 64], [1, 2, 300, 64]].map(|shape| normal(1, &shape, DType::F16));
        let [q_there, k_there, v_there] =
            [&q, &k, &v].map(|x| CudaTensor::upload(&stream, &x.view()).unwrap());
        let none = [f32::NEG_INFINITY; 6];
        let mut sinks = CudaTensor::upload(&stream, &view(&none)).unwrap();
        let out = CudaTensor::uninitialized(&stream, DType::F16, q.shape()).unwrap();
        let run = |sinks: &CudaTensor| {
            let tensors = [q_there.view(), k_there.view(), v_there.view()];
            Attention::new()
                .sinks(sinks.view())
                .forward_on(&cuda, &stream, tensors, out.view(), None)
                .map(drop)
                .unwrap();
        };
        run(&sinks);
        stream.begin_capture().unwrap();
        run(&sinks);
        let graph = stream.end_capture().unwrap().instantiate().unwrap();
        sinks.buffer_mut().copy_from_host(&SINKS).unwrap();
        // SAFETY: the tensors, whose memory the graph uses, outlive its replay.
        unsafe { graph.launch(&stream) }.unwrap();
        let expected = exact(&Attention::new(), [&q, &k, &v]);
        let accuracy = Accuracy::of(&numbers(&out), &expected.out);
        assert!(accuracy.relative_l1 < 0.03, "{accuracy}");

        let error = Attention::new()
            .sinks(&SINKS[..])
            .forward_on(&cuda, &stream, [q_there.view(), k_there.view(), v_there.view()], out.view(), None)
            .map(drop)
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "sinks: value is in this machine's memory, expected in the GPU's, as q"
        );
        // Of host tensors they are copied with these.
        let copied = Attention::new().sinks(&SINKS[..]).device(Device::Cuda(0)).forward(&q, &k, &v).unwrap();
        let accuracy = Accuracy::of(&copied.out.to_f32_vec(), &expected.out);
        assert!(accuracy.relative_l1 < 0.03, "{accuracy}");
    }

    #[test]
    fn the_cache_of_a_gpu_has_them_whole_and_in_parts() {
        let Some(cuda) = gpu::first("the_cache_of_a_gpu_has_them") else { return };
        let stream = cuda.stream().unwrap();
        for tokens in [100, 5000] {
            let (q, k, v) = (
                normal(1, &[2, 6, 1, 64], DType::F16),
                normal(2, &[2, 2, tokens, 64], DType::F16),
                normal(3, &[2, 2, tokens, 64], DType::F16),
            );
            let options = KvCacheOptions::new(2, 64).sequences(2).max_pages(200);
            let mut cache = options.build_on(cuda.clone(), &stream).unwrap();
            let [q_there, k_there, v_there] =
                [&q, &k, &v].map(|x| CudaTensor::upload(&stream, &x.view()).unwrap());
            cache.append(k_there.view(), v_there.view()).unwrap();
            let sinks = CudaTensor::upload(&stream, &view(&SINKS)).unwrap();
            let out = CudaTensor::uninitialized(&stream, DType::F16, q.shape()).unwrap();
            let lse = Buffer::new(&stream, 4 * 12).unwrap();
            let attention = Attention::new().sinks(sinks.view());
            let rows = Some(DeviceLse::of(&lse));
            cache.attend_into(&[0, 1], q_there.view(), &attention, out.view(), rows).unwrap();
            let expected = exact(&Attention::new(), [&q, &k, &v]);
            let accuracy = Accuracy::of(&numbers(&out), &expected.out);
            assert!(accuracy.relative_l1 < 0.02, "{tokens} tokens: {accuracy}");
            let accuracy = Accuracy::of(&lse.to_vec::<f32>().unwrap(), &expected.lse);
            assert!(accuracy.max_abs_error < 0.03, "{tokens} tokens: LSE {accuracy}");
        }
    }
}
