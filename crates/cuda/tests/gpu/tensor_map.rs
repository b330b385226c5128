//! The bulk copy engine.

use std::io::{self, Write as _};

use sage_cuda::{Buffer, Driver, ElementType, KernelSource, L2Promotion, Stream, Swizzle, TensorMap};
use sage_ptx::{Param, ParamType, Target};

use crate::support::alone;

/// Copies a tile of 64 × 8 halves, swizzled within 128 bytes, to shared memory and from there, as it lies, to `out`.
const TILE: &str = r"
.version 8.0
.target sm_90
.address_size 64

.visible .entry tile(.param .align 64 .b8 map[128], .param .u64 out)
{
    .reg .pred %p, %q;
    .reg .b32 %r<8>;
    .reg .b64 %d<6>;
    .shared .align 1024 .b8 data[1024];
    .shared .align 8 .b64 bar;
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, data;
    mov.u32 %r2, bar;
    setp.ne.u32 %p, %r0, 0;
    @%p bra ready;
    mbarrier.init.shared.b64 [%r2], 1;
    fence.proxy.async.shared::cta;
    mbarrier.arrive.expect_tx.shared.b64 %d0, [%r2], 1024;
    mov.b64 %d1, map;
    cvta.param.u64 %d1, %d1;
    mov.u32 %r3, 64;
    mov.u32 %r4, 4;
    cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%d1, {%r3, %r4}], [%r2];
ready:
    bar.sync 0;
wait:
    mbarrier.try_wait.parity.shared.b64 %q, [%r2], 0;
    @!%q bra wait;
    shl.b32 %r5, %r0, 2;
    add.u32 %r6, %r1, %r5;
    ld.shared.b32 %r7, [%r6];
    ld.param.u64 %d2, [out];
    cvt.u64.u32 %d3, %r5;
    add.u64 %d4, %d2, %d3;
    st.global.b32 [%d4], %r7;
    ret;
}
";

#[test]
fn a_tensor_map_leads_the_copy_engine() {
    let device = device!();
    if device.info().capability.0 < 9 {
        say!("skipped: {} has no bulk tensor copies", device.info().name);
        return;
    }
    let stream = Stream::new(&device).unwrap();
    // 10 rows of 128 halves: the tile from row 4 has six rows inside, and two outside that read as zeros.
    let halves: Vec<u16> = (0..10 * 128).map(|i| i as u16 + 1).collect();
    let tensor = Buffer::from_slice(&stream, &halves).unwrap();
    let out = Buffer::from_slice(&stream, &[0xffff_u16; 512]).unwrap();
    let map = TensorMap {
        name: "x",
        element: ElementType::F16,
        address: tensor.address(),
        shape: &[128, 10],
        strides: &[256],
        tile: &[64, 8],
        swizzle: Swizzle::B128,
        promotion: L2Promotion::B128,
    };
    let param = |name: &str, ty| Param { name: name.into(), ty };
    let kernel = device
        .load(&KernelSource {
            name: "tile",
            ptx: TILE,
            target: Target::SM_90,
            params: &[param("map", ParamType::TensorMap), param("out", ParamType::Pointer)],
            block: [256, 1, 1],
            cluster: None,
            dynamic_shared_bytes: 0,
            needs_whole_compilation: false,
            waits_for_launches_before: false,
        })
        .unwrap();
    let args = [map.encode(&device).unwrap(), out.arg()];
    // SAFETY: the map is of `tensor`, and the kernel writes the 512 values of `out`; both are of this stream.
    unsafe { kernel.launch(&stream, [1, 1, 1], &args) }.unwrap();
    let found = out.to_vec::<u16>().unwrap();
    for row in 0..8 {
        for column in 0..64 {
            let wanted = if row < 6 { halves[(4 + row) * 128 + 64 + column] } else { 0 };
            // Chunks of eight halves change places with the row.
            let at = row * 64 + ((column / 8) ^ row) * 8 + column % 8;
            assert_eq!(found[at], wanted, "row {row}, column {column}");
        }
    }
    let wrong = TensorMap { address: tensor.address() + 8, ..map }.encode(&device).unwrap_err().to_string();
    assert!(wrong.starts_with("tensor map of `x`: address: value is 0x"), "{wrong}");
}
