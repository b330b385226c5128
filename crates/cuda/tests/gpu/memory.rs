//! Memory, and graphs that have memory of their own.

use sage_cuda::{Buffer, Driver, Stream};

use crate::support::{Case, N, alone, fresh, grid, load, params, source, values};

#[test]
fn buffers_hold_what_is_put_into_them() {
    let device = device!();
    let stream = Stream::new(&device).unwrap();
    let mut buffer = Buffer::new(&stream, 4 * N).unwrap();
    assert!(buffer.address().is_multiple_of(256) && buffer.bytes() == 4 * N);
    buffer.fill(0xa5).unwrap();
    assert_eq!(buffer.to_vec::<u32>().unwrap(), vec![0xa5a5_a5a5; N]);
    let error = buffer.copy_from_host(&[0_u8; 3]).unwrap_err().to_string();
    assert_eq!(error, "host memory's size in bytes: value is 3, expected the buffer's, 4000");
    assert!(buffer.to_vec::<[u64; 3]>().is_err(), "4000 bytes are no whole number of 24");
    let mut nothing = Buffer::new(&stream, 0).unwrap();
    assert_eq!(nothing.address(), 0);
    nothing.fill(1).unwrap();
    assert!(nothing.to_vec::<f32>().unwrap().is_empty());
    let huge = Buffer::new(&stream, 1 << 50).unwrap_err().to_string();
    assert!(huge.contains("CUDA_ERROR_OUT_OF_MEMORY") || huge.contains("CUDA_ERROR_INVALID_VALUE"), "{huge}");
}

#[test]
fn a_captured_graph_replays_with_changed_inputs_and_memory_of_its_own() {
    let device = device!();
    let kernel = load(&device);
    let stream = Stream::new(&device).unwrap();
    let mut case = Case::new(&stream);
    let older = Buffer::new(&stream, 1 << 16).unwrap();

    assert!(!stream.is_capturing().unwrap());
    stream.begin_capture().unwrap();
    assert!(stream.is_capturing().unwrap());
    {
        // out = (x + 2 y) + 2 y by way of a buffer that only the graph has.
        let mut between = Buffer::new(&stream, 4 * N).unwrap();
        between.fill(0xff).unwrap();
        let (mut first, mut second) = (case.args(), case.args());
        first[2] = between.arg();
        second[0] = between.arg();
        // SAFETY: as `Case::launch`; the buffer between has as many elements, and the graph frees it afterwards.
        unsafe { kernel.launch(&stream, grid(), &first) }.unwrap();
        // Loading a kernel is allowed, though the capture forbids what it does by default.
        let other = device.load(&source(&fresh(1), &params())).unwrap();
        // SAFETY: as above.
        unsafe { other.launch(&stream, grid(), &second) }.unwrap();
    }
    drop(older);
    let copy = case.x.copy_from_host(&values(1.0)).unwrap_err().to_string();
    assert_eq!(copy, "stream of a host copy: value is being captured, expected one that is not");
    let graph = stream.end_capture().unwrap().instantiate().unwrap();
    assert!(!stream.is_capturing().unwrap());
    assert!(case.out.to_vec::<f32>().unwrap().iter().all(|x| x.is_nan()), "recorded work ran already");

    for (x, y) in [(1.0, 0.5), (2.0, 0.25), (0.5, 4.0)] {
        case.x.copy_from_host(&values(x)).unwrap();
        case.y.copy_from_host(&values(y)).unwrap();
        case.out.fill(0xff).unwrap();
        // SAFETY: `case` outlives the replays.
        unsafe { graph.launch(&stream) }.unwrap();
        case.check(x, 2.0 * y);
    }
    // Back to back, without a wait between: the graph's memory is free again each time.
    for _ in 0..10 {
        // SAFETY: as above.
        unsafe { graph.launch(&stream) }.unwrap();
    }
    case.check(0.5, 8.0);
    drop(graph);
    Buffer::new(&stream, 1 << 16).unwrap();
    stream.synchronize().unwrap();
}
