//! Bulk loads, of tensors and of bytes side by side, which arrive some turns later and tell an `mbarrier`.

use sage_ptx::Arg;

use super::context::Context;
use super::descriptor::swizzle;
use crate::fault::{FaultKind, Outcome, Trouble};
use crate::lanes::lanes;
use crate::machine::{Access, AccessKind, BulkLoad, Flow, Launch, PARAM_BASE, PARAM_BYTES, State};
use crate::tensor_map::{Swizzle, TensorMap};

impl State {
    /// A bulk load arrives.
    pub fn land(&mut self, cx: &Launch<'_>, load: BulkLoad) -> Outcome<()> {
        let Some(barrier) = self.mbarriers.get(load.mbarrier) else { return Ok(()) };
        let component = self.clocks.mbarrier_component(barrier.index);
        let count = self.clocks.tick(component);
        barrier.stamp.add(component, count);
        barrier.bytes -= load.bytes;
        let (bytes, init_at) = (barrier.bytes, barrier.init_at);
        if bytes < -(1 << 20) {
            let (place, name) = cx.layout.place(load.mbarrier);
            let detail = format!("the mbarrier at {place} got {} bytes more than announced", -bytes);
            return Err(Trouble::new(FaultKind::Mbarrier, detail).object(name).other(init_at));
        }
        let who =
            Access { warp: load.warp, component, count, at: load.at, kind: AccessKind::Write, proxy: true };
        for (offset, data) in load.chunks {
            self.shared.land(offset as usize, 16, data, &who);
        }
        self.settle_mbarrier(load.mbarrier);
        Ok(())
    }
}

impl Context<'_, '_> {
    /// The tensor map at a parameter's address.
    fn map_at(&self, address: u64) -> Outcome<TensorMap> {
        let index = address.wrapping_sub(PARAM_BASE) / PARAM_BYTES;
        let arg = usize::try_from(index).ok().and_then(|index| self.cx.args.get(index));
        match arg {
            Some(Arg::TensorMap(bytes)) if (address - PARAM_BASE).is_multiple_of(PARAM_BYTES) => {
                let name = self.cx.code.program.params.get(index as usize).map(|param| param.name.clone());
                TensorMap::decode(bytes).map_err(|trouble| trouble.object(name.unwrap_or_default()))
            }
            _ => {
                let detail = format!("no tensor map at address {address:#x}");
                Err(Trouble::new(FaultKind::TensorMap, detail))
            }
        }
    }

    fn corner(&self, dims: usize, src: &[u32], lane: usize) -> Outcome<Vec<i32>> {
        let read = |&register: &u32| Ok(self.warp.read(&self.cx.code, register, 1 << lane)?[lane] as i32);
        src.iter().take(dims).map(read).collect()
    }

    fn checked(&self, map: TensorMap, dims: usize, shared: u32) -> Outcome<TensorMap> {
        if map.shape.len() != dims {
            let detail = format!("a copy of {dims} dimensions by a tensor map of {}", map.shape.len());
            return Err(Trouble::new(FaultKind::TensorMap, detail));
        }
        if !shared.is_multiple_of(128) {
            let (place, name) = self.cx.layout.place(shared);
            let detail = format!("a bulk copy at {place} (shared address {shared:#x}), no multiple of 128");
            return Err(Trouble::new(FaultKind::Misaligned, detail).object(name));
        }
        Ok(map)
    }

    pub fn bulk_load(&mut self, src: &[u32]) -> Outcome<Flow> {
        let active = self.warp.active;
        let code = &self.cx.code;
        let [to, from, bytes, barriers] = [0, 1, 2, 3].map(|i| self.warp.read(code, src[i], active).copied());
        let (to, from, bytes, barriers) = (to?, from?, bytes?, barriers?);
        for lane in lanes(active) {
            let load =
                self.bulk_load_of(to[lane] as u32, from[lane], bytes[lane] as u32, barriers[lane] as u32);
            load.map_err(|trouble| trouble.lane(lane))?;
        }
        self.warp.progressed();
        Ok(Flow::Next)
    }

    fn bulk_load_of(&mut self, to: u32, from: u64, bytes: u32, mbarrier: u32) -> Outcome<()> {
        if !(u64::from(to) | from | u64::from(bytes)).is_multiple_of(16) {
            let (place, name) = self.cx.layout.place(to);
            let detail =
                format!("a bulk copy of {bytes} bytes from {from:#x} to {place}, not all multiples of 16");
            return Err(Trouble::new(FaultKind::Misaligned, detail).object(name));
        }
        let read = |offset: u32| {
            let value = self.cx.global.read(from.wrapping_add(offset.into()), 16)?;
            Ok((to.wrapping_add(offset), value))
        };
        let chunks = (0..bytes).step_by(16).map(read).collect::<Outcome<Vec<_>>>()?;
        self.start_bulk_load(mbarrier, chunks)
    }

    pub fn bulk_tensor_load(&mut self, dims: usize, src: &[u32]) -> Outcome<Flow> {
        let active = self.warp.active;
        let code = &self.cx.code;
        let to = *self.warp.read(code, src[0], active)?;
        let maps = *self.warp.read(code, src[1], active)?;
        let barriers = *self.warp.read(code, src[2], active)?;
        for lane in lanes(active) {
            let (to, barrier) = (to[lane] as u32, barriers[lane] as u32);
            let load = self.bulk_tensor_load_of(dims, lane, to, maps[lane], barrier, &src[3..]);
            load.map_err(|trouble| trouble.lane(lane))?;
        }
        self.warp.progressed();
        Ok(Flow::Next)
    }

    fn bulk_tensor_load_of(
        &mut self,
        dims: usize,
        lane: usize,
        to: u32,
        map: u64,
        mbarrier: u32,
        corner: &[u32],
    ) -> Outcome<()> {
        let map = self.checked(self.map_at(map)?, dims, to)?;
        let corner = self.corner(dims, corner, lane)?;
        let row_bytes = map.row_bytes();
        let mut chunks = Vec::new();
        for row in 0..map.rows() {
            let data = self.fetch_row(&map, &corner, row)?;
            for (i, chunk) in data.chunks_exact(16).enumerate() {
                let mut value = [0; 16];
                value.copy_from_slice(chunk);
                let address = place_of(&map, to, row * row_bytes + 16 * i as u32);
                chunks.push((address, u128::from_le_bytes(value)));
            }
        }
        self.start_bulk_load(mbarrier, chunks)
    }

    /// Sends 16 bytes to each of some shared addresses, which count at an `mbarrier` when they arrive.
    fn start_bulk_load(&mut self, mbarrier: u32, chunks: Vec<(u32, u128)>) -> Outcome<()> {
        self.use_mbarrier(mbarrier)?;
        if let Some(barrier) = self.state.mbarriers.get(mbarrier).filter(|barrier| !barrier.fenced) {
            let (place, name) = self.cx.layout.place(mbarrier);
            let detail =
                format!("the mbarrier at {place} was initialised and not fenced for the copy engine");
            let trouble = Trouble::new(FaultKind::MissingProxyFence, detail).object(name);
            return Err(trouble.other(barrier.init_at));
        }
        let copy = self.state.shared.begin_copy(self.warp.instr, self.warp.index);
        let access = Access { proxy: true, ..self.access(AccessKind::Announce) };
        let place = |(address, value): (u32, u128)| {
            let (layout, clocks) = (&self.cx.layout, &self.state.clocks);
            let offset = self.state.shared.check(layout, clocks, &access, address, 16)?;
            Ok((offset as u32, value))
        };
        let chunks = chunks.into_iter().map(place).collect::<Outcome<Vec<_>>>()?;
        for &(offset, _) in &chunks {
            self.state.shared.mark_busy(offset as usize, 16, copy);
        }
        let bytes = 16 * chunks.len() as i64;
        self.stats.bulk_bytes += bytes as u64;
        self.state.bulk_loads.push(BulkLoad {
            // Later than the next turn, and not in the order of issue.
            lands_at: self.state.turn + 2 + (u64::from(copy) * 5) % 7,
            mbarrier,
            bytes,
            warp: self.warp.index as usize,
            at: self.warp.instr,
            chunks,
        });
        Ok(())
    }

    /// A row of the box, with zeros for what lies outside of the tensor.
    fn fetch_row(&self, map: &TensorMap, corner: &[i32], row: u32) -> Outcome<Vec<u8>> {
        let mut data = vec![0; map.row_bytes() as usize];
        let Some((address, inside)) = map.row(corner, row) else { return Ok(data) };
        let size = u64::from(map.element_bytes);
        let mut i = inside.start as u64 * size;
        let end = inside.end as u64 * size;
        while i < end {
            let bytes = if address.wrapping_add(i).is_multiple_of(16) && i + 16 <= end { 16 } else { size };
            let value = self.cx.global.read(address.wrapping_add(i), bytes as u32)?;
            data[i as usize..(i + bytes) as usize].copy_from_slice(&value.to_le_bytes()[..bytes as usize]);
            i += bytes;
        }
        Ok(data)
    }
}

/// Shared address of a byte of the box.
fn place_of(map: &TensorMap, base: u32, byte: u32) -> u32 {
    let address = base.wrapping_add(byte);
    match map.swizzle {
        Swizzle::None => address,
        swizzled => swizzle(address, swizzled.chunks()),
    }
}
