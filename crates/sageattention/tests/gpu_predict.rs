//! Predictions of block maps on a real GPU. Without a driver each test prints that it is skipped.

#![cfg(feature = "cuda")]

use sage_testkit::{gpu, normal_tensor, predictions};
use sageattention::cuda::{Buffer, CudaTensor, DeviceBytes, DeviceInts, DeviceTensor};
use sageattention::sparse::{Predictor, Select};
use sageattention::{Attention, DType, Device, Geometry, Lengths, Preset, Tensor};

#[test]
fn maps_are_the_oracles() {
    let Some(cuda) = gpu::first("maps_are_the_oracles") else { return };
    for case in predictions() {
        case.compare("a GPU", &gpu::predicted(&cuda, &case));
    }
}

fn sparge() -> Predictor {
    Predictor::sparge_attn(Select::Cdf(0.5.into()), 0.0).sink_k(0..1)
}

fn tensors() -> [Tensor; 3] {
    [1, 2, 3].map(|seed| normal_tensor(seed, &[2, 4, 700, 64], DType::F16))
}

#[test]
fn attention_is_over_the_map_that_it_predicts() {
    let Some(cuda) = gpu::first("attention_is_over_the_map_that_it_predicts") else { return };
    let stream = cuda.stream().unwrap();
    let host = tensors();
    let [q, k, v] = host.each_ref().map(|tensor| CudaTensor::upload(&stream, &tensor.view()).unwrap());
    let inputs = [q.view(), k.view(), v.view()];
    let attention = Attention::new().scheme(Preset::FULL).causal(true);
    let sparse = attention.clone().sparse(sparge());
    let output = || CudaTensor::uninitialized(&stream, DType::F16, &[2, 4, 700, 64]).unwrap();
    let bits = |out: &CudaTensor| out.buffer().to_vec::<u16>().unwrap();

    let out = output();
    let map = sparse.forward_on(&cuda, &stream, inputs, out.view(), None).unwrap().expect("predicted");
    let on_host = sparge().predict(host[0].view(), host[1].view(), &attention.options()).unwrap();
    assert_eq!(map.to_host().unwrap(), on_host);
    assert!(on_host.kept() * 10 < on_host.flags().len() * 5, "a map of {} tells little", on_host.kept());
    // A map of the caller's may have more blocks of keys, none of which is kept.
    let [batch, heads, rows, columns] = map.shape();
    let mut wider = Buffer::new(&stream, batch * heads * rows * (columns + 3)).unwrap();
    wider.fill(7).unwrap();
    for more in [0, 3] {
        let shape = [batch, heads, rows, columns + more];
        let geometry = Geometry::contiguous("map", &shape).unwrap();
        // SAFETY: the buffer has as many bytes and more.
        map.copy_to(unsafe { DeviceBytes::from_raw(geometry, wider.address()) }).unwrap();
        let bytes: Vec<u8> = wider.to_vec().unwrap();
        for (copied, flags) in bytes.chunks(columns + more).zip(on_host.rows()) {
            assert!(copied[..columns].iter().zip(flags).all(|(&byte, &flag)| byte == u8::from(flag)));
            assert!(copied[columns..].iter().all(|&byte| byte == 0));
        }
    }
    let given = output();
    let masked = attention.clone().block_mask(map.mask());
    masked.forward_on(&cuda, &stream, inputs, given.view(), None).unwrap();
    assert_eq!(bits(&out), bits(&given));

    // Prediction and attention as a graph, also with numbers that each head has of its own: they are there already.
    let of_heads =
        Predictor::sparge_attn(Select::Cdf(vec![0.5, 0.3, 0.7, 0.5].into()), vec![0.0, 0.1, 0.0, -0.1]);
    for sparse in [sparse, attention.sparse(of_heads)] {
        let (out, replayed) = (output(), output());
        let run =
            |to: DeviceTensor<'_>| sparse.forward_on(&cuda, &stream, inputs, to, None).map(drop).unwrap();
        run(out.view());
        stream.begin_capture().unwrap();
        run(replayed.view());
        let graph = stream.end_capture().unwrap().instantiate().unwrap();
        // SAFETY: what the graph uses outlives its replay.
        unsafe { graph.launch(&stream) }.unwrap();
        assert_eq!(bits(&out), bits(&replayed));
    }
}

/// Boundaries in the GPU's memory are read there: the calls are captured in a graph, which nothing may wait for, and the
/// graph computes other sequences when the boundaries change.
#[test]
fn packed_sequences_are_predicted_where_their_boundaries_lie() {
    let Some(cuda) = gpu::first("packed_sequences_are_predicted_where_their_boundaries_lie") else { return };
    let stream = cuda.stream().unwrap();
    let host = [1, 2, 3].map(|seed| normal_tensor(seed, &[900, 4, 64], DType::F16));
    let [q, k, v] = host.each_ref().map(|tensor| CudaTensor::upload(&stream, &tensor.view()).unwrap());
    let attention = Attention::new().scheme(Preset::FULL).causal(true);
    let (first, second) = ([0, 300, 300, 900], [0, 500, 730, 900]);
    let mut boundaries = Buffer::from_slice(&stream, &first).unwrap();
    // SAFETY: the buffer has four numbers, and lives until the stream is done.
    let list = unsafe { DeviceInts::from_raw(boundaries.address(), 4) };
    let lengths =
        Lengths::DevicePacked { cu_seqlens_q: list, cu_seqlens_k: list, max_q_len: 600, max_kv_len: 600 };
    let on_gpu = attention.clone().sparse(sparge()).lengths(lengths);
    let out = CudaTensor::uninitialized(&stream, DType::F16, &[900, 4, 64]).unwrap();
    let run = || on_gpu.forward_on(&cuda, &stream, [q.view(), k.view(), v.view()], out.view(), None).unwrap();
    let expected = |boundaries: &[i32; 4]| {
        let packed = attention.clone().sparse(sparge()).packed(boundaries, boundaries);
        packed.device(Device::Cuda(0)).forward(&host[0], &host[1], &host[2]).unwrap()
    };
    let bits = || out.buffer().to_vec::<u16>().unwrap();
    let bits_of = |tensor: &Tensor| match tensor.view() {
        sageattention::TensorView::F16(view) => view.data().iter().map(|x| x.to_bits()).collect::<Vec<u16>>(),
        _ => panic!("in half precision"),
    };

    let map = run().expect("predicted").to_host().unwrap();
    let of_host = expected(&first);
    assert_eq!(Some(map), of_host.map);
    let on_cpu = attention.clone().sparse(sparge()).packed(&first, &first);
    assert_eq!(of_host.map, Some(on_cpu.predict(&host[0], &host[1]).unwrap()));
    assert_eq!(bits(), bits_of(&of_host.out));
    stream.begin_capture().unwrap();
    drop(run());
    let graph = stream.end_capture().unwrap().instantiate().unwrap();
    for sequences in [second, first] {
        boundaries.copy_from_host(&sequences).unwrap();
        // SAFETY: what the graph uses outlives its replay.
        unsafe { graph.launch(&stream) }.unwrap();
        assert_eq!(bits(), bits_of(&expected(&sequences).out));
    }
}

#[test]
fn host_tensors_are_predicted_on_the_gpu_as_well() {
    if gpu::first("host_tensors_are_predicted_on_the_gpu_as_well").is_none() {
        return;
    }
    let [q, k, v] = tensors();
    let sparse = Attention::new().sparse(sparge()).return_lse(true);
    let on_gpu = sparse.clone().device(Device::Cuda(0));
    let result = on_gpu.forward(&q, &k, &v).unwrap();
    let expected = sparse.predict(&q, &k).unwrap();
    assert_eq!((result.map, on_gpu.predict(&q, &k).unwrap()), (Some(expected.clone()), expected));
    let plan = on_gpu.plan(&q, &k, &v).unwrap().to_string();
    assert!(plan.contains("choose_blocks_within_share") && plan.contains("list_tiles"), "{plan}");
}
