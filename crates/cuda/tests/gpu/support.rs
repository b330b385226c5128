//! A small kernel, its data, and the device that it runs on.

use std::ops::Deref;
use std::sync::{Mutex, MutexGuard, PoisonError};

use sage_cuda::{Buffer, Device, Kernel, KernelSource, Stream};
use sage_ptx::{Arg, Param, ParamType, Target};

/// A device for one test at a time: a capture forbids other threads to wait for the whole GPU, and times would be off.
pub(crate) struct Alone {
    device: Device,
    _turn: MutexGuard<'static, ()>,
}

impl Deref for Alone {
    type Target = Device;
    fn deref(&self) -> &Device {
        &self.device
    }
}

pub(crate) fn alone() -> Alone {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    Alone { device: Device::with_cache(0, None).unwrap(), _turn: turn }
}

pub(crate) const N: usize = 1000;

/// `out[i] = x[i] + scale * y[i]` for `i < n`.
pub(crate) const AXPY: &str = r"
.version 7.0
.target sm_75
.address_size 64

.visible .entry axpy(.param .u64 x, .param .u64 y, .param .u64 out, .param .f32 scale, .param .u32 n)
{
    .reg .pred %p;
    .reg .b32 %r<5>;
    .reg .f32 %f<5>;
    .reg .b64 %d<8>;
    mov.u32 %r0, %ctaid.x;
    mov.u32 %r1, %ntid.x;
    mov.u32 %r2, %tid.x;
    mad.lo.u32 %r3, %r0, %r1, %r2;
    ld.param.u32 %r4, [n];
    setp.ge.u32 %p, %r3, %r4;
    @%p bra done;
    ld.param.u64 %d0, [x];
    ld.param.u64 %d1, [y];
    ld.param.u64 %d2, [out];
    ld.param.f32 %f0, [scale];
    mul.wide.u32 %d3, %r3, 4;
    add.u64 %d4, %d0, %d3;
    add.u64 %d5, %d1, %d3;
    add.u64 %d6, %d2, %d3;
    ld.global.f32 %f1, [%d4];
    ld.global.f32 %f2, [%d5];
    fma.rn.f32 %f3, %f0, %f2, %f1;
    st.global.f32 [%d6], %f3;
done:
    ret;
}
";

pub(crate) fn params() -> Vec<Param> {
    let param = |name: &str, ty| Param { name: name.into(), ty };
    let pointers = ["x", "y", "out"].map(|name| param(name, ParamType::Pointer));
    [&pointers[..], &[param("scale", ParamType::F32), param("n", ParamType::U32)]].concat()
}

pub(crate) fn source<'a>(ptx: &'a str, params: &'a [Param]) -> KernelSource<'a> {
    KernelSource {
        name: "axpy",
        ptx,
        target: Target::SM_75,
        params,
        block: [128, 1, 1],
        cluster: None,
        dynamic_shared_bytes: 0,
        needs_whole_compilation: false,
        waits_for_launches_before: false,
    }
}

pub(crate) fn load(device: &Device) -> Kernel {
    device.load(&source(AXPY, &params())).unwrap()
}

/// A text that no cache, the driver's own included, has seen before, and that takes a while to compile.
pub(crate) fn fresh(lines: usize) -> String {
    let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos();
    let mark = (nanos % 1_000_000_007) as u32 | 1;
    let mut work = format!("    xor.b32 %r3, %r3, {mark};\n    xor.b32 %r3, %r3, {mark};\n");
    for i in 0..lines {
        work +=
            &format!("    fma.rn.f32 %f3, %f3, 0f3F800000, %f0;\n    ex2.approx.f32 %f4, %f{};\n", 1 + i % 3);
        work += "    add.f32 %f3, %f3, %f4;\n";
    }
    // Never taken: n is not 2^32 - 1, but the compiler does not know.
    let guarded =
        format!("    setp.ne.u32 %p, %r4, 0xffffffff;\n    @%p bra store;\n{work}store:\n    st.global");
    AXPY.replace("    st.global", &guarded)
}

pub(crate) fn grid() -> [u32; 3] {
    [(N as u32).div_ceil(128), 1, 1]
}

pub(crate) struct Case {
    pub(crate) x: Buffer,
    pub(crate) y: Buffer,
    pub(crate) out: Buffer,
}

impl Case {
    pub(crate) fn new(stream: &Stream) -> Case {
        let (x, y) = (values(1.0), values(0.5));
        let out = Buffer::from_slice(stream, &vec![f32::NAN; N]).unwrap();
        Case { x: Buffer::from_slice(stream, &x).unwrap(), y: Buffer::from_slice(stream, &y).unwrap(), out }
    }

    pub(crate) fn args(&self) -> [Arg; 5] {
        [self.x.arg(), self.y.arg(), self.out.arg(), Arg::F32(2.0), Arg::U32(N as u32)]
    }

    /// Launches `kernel`, which is `axpy` or does as much, on these data.
    pub(crate) fn launch(&self, kernel: &Kernel, stream: &Stream, grid: [u32; 3]) -> sage_cuda::Result<()> {
        // SAFETY: the kernel stays within `N` elements of each buffer; they are freed in the order of their stream,
        // which is this one or has waited for this one before.
        unsafe { kernel.launch(stream, grid, &self.args()) }
    }

    pub(crate) fn check(&self, x: f32, y: f32) {
        let wanted: Vec<f32> = values(x).iter().zip(values(y)).map(|(x, y)| x + 2.0 * y).collect();
        assert_eq!(self.out.to_vec::<f32>().unwrap(), wanted);
    }
}

/// Small multiples of a power of two, whose sums are exact.
pub(crate) fn values(unit: f32) -> Vec<f32> {
    (0..N).map(|i| unit * (i % 251) as f32).collect()
}
