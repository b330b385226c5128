//! Launches and events.

use std::io::{self, Write as _};
use std::time::Instant;

use sage_cuda::{Buffer, Driver, Error, Event, KernelSource, Stream};
use sage_ptx::{Arg, Target};

use crate::support::{AXPY, Case, alone, grid, load, params, source};

#[test]
fn a_kernel_runs_on_own_borrowed_and_default_streams() {
    let device = device!();
    let kernel = load(&device);
    let attributes = kernel.attributes();
    assert!(attributes.registers > 0 && attributes.local_bytes == 0 && attributes.static_shared_bytes == 0);
    assert!(attributes.max_blocks_per_multiprocessor >= 8, "{attributes:?}");
    let own = Stream::new(&device).unwrap();
    // SAFETY: `own` outlives its borrower, and the numbers are those of the default streams.
    let [borrowed, legacy, legacy_too, thread] =
        unsafe { [own.handle(), 0, 1, 2].map(|handle| Stream::from_raw(&device, handle)) };
    assert_eq!(borrowed.handle(), own.handle());
    for stream in [&own, &borrowed, &legacy, &legacy_too, &thread] {
        let case = Case::new(stream);
        case.launch(&kernel, stream, grid()).unwrap();
        stream.synchronize().unwrap();
        case.check(1.0, 0.5);
        // A grid without blocks is no work and no error.
        case.launch(&kernel, stream, [0, 1, 1]).unwrap();
    }
    device.synchronize().unwrap();
}

#[test]
fn wrong_launches_are_refused_before_the_driver_sees_them() {
    let device = device!();
    let kernel = load(&device);
    let stream = Stream::new(&device).unwrap();
    let case = Case::new(&stream);
    // SAFETY: nothing is launched, or it is what `Case::launch` would launch.
    let message = |grid, args: &[Arg]| unsafe { kernel.launch(&stream, grid, args) }.unwrap_err().to_string();
    let mut args = case.args();
    assert_eq!(message(grid(), &args[..4]), "kernel `axpy`: argument 4 (`n`) is missing, expected a u32");
    args[3] = Arg::I64(2);
    assert_eq!(message(grid(), &args), "kernel `axpy`: argument 3 (`scale`) is an i64, expected an f32");
    assert_eq!(
        message([1, 70000, 1], &case.args()),
        "kernel `axpy`: grid y is 70000, expected at most 65535"
    );
    stream.synchronize().unwrap();
    assert!(case.out.to_vec::<f32>().unwrap().iter().all(|x| x.is_nan()), "nothing ran");

    let params = params();
    let good = source(AXPY, &params);
    let shared = device.info().shared_bytes_per_block;
    let most = device.load(&KernelSource { dynamic_shared_bytes: shared, ..good }).unwrap();
    assert_eq!(most.attributes().max_blocks_per_multiprocessor, 1);
    case.launch(&most, &stream, grid()).unwrap();
    case.check(1.0, 0.5);
    for wrong in [
        KernelSource { dynamic_shared_bytes: shared + 1, ..good },
        KernelSource { block: [2048, 1, 1], ..good },
    ] {
        assert!(matches!(device.load(&wrong), Err(Error::Limit { .. })), "{wrong:?}");
    }
    let gpu = device.info().target();
    let foreign = if gpu == Target::SM_90A { Target::SM_100A } else { Target::SM_90A };
    let error = device.load(&KernelSource { target: foreign, ..good }).unwrap_err();
    assert_eq!(error, Error::Target { kernel: "axpy".into(), found: gpu, wanted: foreign });
}

#[test]
fn events_measure_and_order() {
    let device = device!();
    let kernel = load(&device);
    let (first, second) = (Stream::new(&device).unwrap(), Stream::new(&device).unwrap());
    let case = Case::new(&first);
    let [start, end] = [(); 2].map(|()| Event::new(&device, true).unwrap());
    first.record(&start).unwrap();
    for _ in 0..1000 {
        case.launch(&kernel, &first, grid()).unwrap();
    }
    first.record(&end).unwrap();
    let ms = start.elapsed_ms(&end).unwrap();
    say!("1000 launches took {ms:.3} ms on the GPU");
    assert!(ms > 0.1 && ms < 1000.0, "{ms}");

    let order = Event::new(&device, false).unwrap();
    case.launch(&kernel, &first, grid()).unwrap();
    first.record(&order).unwrap();
    second.wait_event(&order).unwrap();
    case.launch(&kernel, &second, grid()).unwrap();
    second.synchronize().unwrap();
    case.check(1.0, 0.5);
    assert!(order.elapsed_ms(&end).is_err(), "an event without timing measures nothing");
}

#[test]
fn a_warm_launch_costs_the_host_little() {
    let device = device!();
    let kernel = load(&device);
    let stream = Stream::new(&device).unwrap();
    let case = Case::new(&stream);
    let args = case.args();
    let rounds = 200;
    let time = |work: &dyn Fn()| {
        let best = (0..20).map(|_| {
            stream.synchronize().unwrap();
            let started = Instant::now();
            (0..rounds).for_each(|_| work());
            started.elapsed()
        });
        best.min().unwrap().as_secs_f64() * 1e6 / f64::from(rounds)
    };
    // SAFETY: as `Case::launch`, which would make its arguments anew each time.
    let launch = time(&|| unsafe { kernel.launch(&stream, grid(), &args) }.unwrap());
    let memory = time(&|| drop(Buffer::new(&stream, 1 << 20).unwrap()));
    // SAFETY: a grid without blocks goes to no address.
    let check = time(&|| drop(unsafe { kernel.launch(&stream, [0, 1, 1], &args) }));
    say!(
        "warm launch {launch:.2} us, of it our checks {check:.3} us; allocate and free 1 MiB {memory:.2} us"
    );
    assert!(launch < 100.0 && memory < 100.0);
    case.check(1.0, 0.5);
}

#[test]
fn clusters_launch_where_there_are_any() {
    let device = device!();
    let params = params();
    let clustered = KernelSource { cluster: Some([2, 1, 1]), ..source(AXPY, &params) };
    if device.info().capability.0 < 9 {
        assert!(matches!(device.load(&clustered), Err(Error::Limit { .. })));
        say!("skipped: {} has no clusters", device.info().name);
        return;
    }
    // The kernel returns at once unless it runs in a cluster of two.
    let ptx = AXPY.replace(".version 7.0", ".version 7.8").replace(".target sm_75", ".target sm_90").replace(
        "    mov.u32 %r0, %ctaid.x;",
        "    mov.u32 %r0, %cluster_nctaid.x;\n    setp.ne.u32 %p, %r0, 2;\n    @%p bra done;\n    \
         mov.u32 %r0, %ctaid.x;",
    );
    let clustered = KernelSource { ptx: &ptx, target: Target::SM_90, ..clustered };
    let kernel = device.load(&clustered).unwrap();
    let stream = Stream::new(&device).unwrap();
    let case = Case::new(&stream);
    case.launch(&kernel, &stream, grid()).unwrap();
    case.check(1.0, 0.5);
    let odd = case.launch(&kernel, &stream, [7, 1, 1]).unwrap_err().to_string();
    assert_eq!(odd, "kernel `axpy`: grid x is 7, expected a multiple of the cluster's 2");
}
