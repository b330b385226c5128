//! `wgmma`: products of a warpgroup whose operands and results are out of reach until waited for.

use sage_ptx::isa::{Matrix, Mma, MmaTy, Op, Wgmma};

use super::context::Context;
use super::descriptor::Descriptor;
use super::fragment::{Numbers, empty, float, fragment_a, integer};
use super::tensor_core::{add_floats, add_integers, add_truncated, round};
use crate::decode::{Code, Decoded};
use crate::fault::{FaultKind, Outcome, Trouble};
use crate::lanes::{Lanes, mask_of};
use crate::machine::{Access, AccessKind, Flow, Hold, Launch, State, Warp};
use crate::options::Fp8Accumulation;

impl State {
    /// Computes a `wgmma` at which all warps of a group stand, and takes its registers away from them.
    pub fn issue_wgmma(&mut self, cx: &Launch<'_>, group: &mut [Warp], instr: &Decoded) -> Outcome<()> {
        let Op::Matrix(Matrix::Wgmma(op)) = instr.op else { return Ok(()) };
        let code = &cx.code;
        let (a_operands, rest) = instr.src.split_at(if op.a_in_registers { 4 } else { 1 });
        let scale = uniform_bits(group, code, rest[1], |values| u64::from(mask_of(values)))?;
        if scale != 0 && scale != u64::from(u32::MAX) {
            let detail = "wgmma: the predicate that says whether to add differs between lanes";
            return Err(Trouble::new(FaultKind::Divergent, detail));
        }
        let descriptor_b = Descriptor::decode(uniform(group, code, rest[0], "descriptor of B")?)?;
        let at = group[0].instr;
        let component = self.clocks.wgmma_component(group[0].index as usize);
        let count = self.clocks.tick(component);
        for warp in group.iter() {
            for &register in &instr.dst {
                check_register(warp, code, register, true, scale != 0)?;
            }
            if op.a_in_registers {
                for &register in a_operands {
                    check_register(warp, code, register, false, true)?;
                }
            }
        }
        let warps: Vec<usize> = group.iter().map(|warp| warp.index as usize).collect();
        let mut chunk = |address: u32| {
            let mut value = 0;
            for &warp in &warps {
                let access = Access { warp, component, count, at, kind: AccessKind::Read, proxy: true };
                value = self.shared.read(&cx.layout, &self.clocks, &access, address, 16)?;
            }
            Ok(value)
        };
        let b = read_b(op, descriptor_b, &mut chunk)?;
        let shared_a = if op.a_in_registers {
            None
        } else {
            let descriptor = Descriptor::decode(uniform(group, code, a_operands[0], "descriptor of A")?)?;
            Some(read_a(op, descriptor, &mut chunk)?)
        };
        for (w, warp) in group.iter_mut().enumerate() {
            let a = match &shared_a {
                Some(Numbers::Integers(a)) => Numbers::Integers(a[16 * op.k() * w..][..16 * op.k()].to_vec()),
                Some(Numbers::Floats(a)) => Numbers::Floats(a[16 * op.k() * w..][..16 * op.k()].to_vec()),
                None => {
                    let registers: [Lanes; 4] = std::array::from_fn(|i| *warp.raw(a_operands[i]));
                    let [r0, r1, r2, r3] = &registers;
                    fragment_a(Mma { a: op.a, b: op.b, acc: op.acc }, [r0, r1, r2, r3])
                }
            };
            accumulate(op, cx.options.fp8, &a, &b, warp, &instr.dst, scale != 0);
            hold(warp, code, &instr.dst, if op.a_in_registers { a_operands } else { &[] }, at);
            warp.products.open_count = count;
            warp.progressed();
        }
        Ok(())
    }
}

fn uniform_bits(group: &[Warp], code: &Code<'_>, register: u32, of: impl Fn(&Lanes) -> u64) -> Outcome<u64> {
    let mut all = None;
    for warp in group {
        let bits = of(warp.read(code, register, u32::MAX)?);
        if *all.get_or_insert(bits) != bits {
            let detail =
                format!("wgmma: {} differs between the warps of the group", code.register_name(register));
            return Err(Trouble::new(FaultKind::Divergent, detail));
        }
    }
    Ok(all.unwrap_or(0))
}

/// A value that must be the same in all lanes of the group.
fn uniform(group: &[Warp], code: &Code<'_>, register: u32, what: &str) -> Outcome<u64> {
    for warp in group {
        let values = warp.read(code, register, u32::MAX)?;
        if values.iter().any(|&value| value != values[0]) {
            let detail = format!("wgmma: the {what} differs between lanes");
            return Err(Trouble::new(FaultKind::Descriptor, detail));
        }
    }
    uniform_bits(group, code, register, |values| values[0])
}

/// Whether a register may be an accumulator or operand now.
fn check_register(warp: &Warp, code: &Code<'_>, register: u32, accumulator: bool, read: bool) -> Outcome<()> {
    let hold = warp.holds.get(register as usize).copied().unwrap_or_default();
    let other = match (hold, accumulator) {
        (Hold::Operand { at, .. }, true) | (Hold::Accumulator { at, .. }, false) => Some(at),
        _ => None,
    };
    if let Some(at) = other {
        let name = code.register_name(register);
        let detail = format!("wgmma: {name} is in use by a wgmma that was not waited for");
        return Err(Trouble::new(FaultKind::WgmmaInFlight, detail).object(name).other(at));
    }
    if warp.dirty.get(register as usize) == Some(&true) {
        let name = code.register_name(register);
        let detail = format!("wgmma: {name} was written since the last wgmma.fence");
        return Err(Trouble::new(FaultKind::MissingWgmmaFence, detail).object(name));
    }
    if read && warp.written(register) != u32::MAX {
        let name = code.register_name(register);
        let detail = format!("wgmma: {name} was never written by these lanes");
        let missing = !warp.written(register);
        return Err(Trouble::new(FaultKind::UninitializedRegister, detail).lanes(missing).object(name));
    }
    Ok(())
}

/// 64 rows of k elements.
fn read_a(
    op: Wgmma,
    descriptor: Descriptor,
    chunk: &mut impl FnMut(u32) -> Outcome<u128>,
) -> Outcome<Numbers> {
    let k = op.k();
    let mut numbers = empty(op.a, 64 * k);
    for row in 0..64 {
        for i in 0..2 {
            let bits = chunk(descriptor.depth_major(row, i))?;
            let per = 128 / op.a.bits();
            for j in 0..per {
                let at = row as usize * k + i as usize * per + j;
                put(&mut numbers, op.a, at, (bits >> (j * op.a.bits())) as u32);
            }
        }
    }
    Ok(numbers)
}

/// n columns of k integers, or k rows of n floats.
fn read_b(
    op: Wgmma,
    descriptor: Descriptor,
    chunk: &mut impl FnMut(u32) -> Outcome<u128>,
) -> Outcome<Numbers> {
    let (k, n) = (op.k(), usize::from(op.n));
    let mut numbers = empty(op.b, k * n);
    let place =
        |depth: usize, column: usize| if op.b.is_integer() { column * k + depth } else { depth * n + column };
    let per = 128 / op.b.bits();
    if op.b_transposed {
        for depth in 0..k {
            for group in 0..n / 8 {
                let bits = chunk(descriptor.column_major(group as u32, depth as u32))?;
                for j in 0..8 {
                    put(&mut numbers, op.b, place(depth, 8 * group + j), (bits >> (16 * j)) as u32);
                }
            }
        }
    } else {
        for column in 0..n {
            for i in 0..2 {
                let bits = chunk(descriptor.depth_major(column as u32, i as u32))?;
                for j in 0..per {
                    let element = (bits >> (j * op.b.bits())) as u32;
                    put(&mut numbers, op.b, place(i * per + j, column), element);
                }
            }
        }
    }
    Ok(numbers)
}

fn put(numbers: &mut Numbers, ty: MmaTy, at: usize, bits: u32) {
    match numbers {
        Numbers::Integers(numbers) => numbers[at] = integer(ty, bits),
        Numbers::Floats(numbers) => numbers[at] = float(ty, bits),
    }
}

/// One warp's 16 rows.
fn accumulate(
    op: Wgmma,
    fp8: Fp8Accumulation,
    a: &Numbers,
    b: &Numbers,
    warp: &mut Warp,
    dst: &[u32],
    add: bool,
) {
    let (k, n) = (op.k(), usize::from(op.n));
    // Row and column of element `lane` of the `r`-th register.
    let place = |r: usize, lane: usize| {
        let (row, column) = Mma::acc_element(lane, r % 4);
        row * n + 8 * (r / 4) + column
    };
    let mut old = vec![0; 16 * n];
    if add {
        for (r, &register) in dst.iter().enumerate() {
            for (lane, &value) in warp.raw(register).iter().enumerate() {
                old[place(r, lane)] = value as u32;
            }
        }
    }
    let new: Vec<u32> = match (a, b) {
        (Numbers::Integers(a), Numbers::Integers(b)) => {
            let mut c: Vec<i32> = old.into_iter().map(|x| x as i32).collect();
            add_integers(a, b, &mut c, k, n);
            c.into_iter().map(|x| x as u32).collect()
        }
        (Numbers::Floats(a), Numbers::Floats(b)) => {
            let mut c: Vec<f64> = old.into_iter().map(|x| f64::from(f32::from_bits(x))).collect();
            if op.a.bits() == 8 && fp8 == Fp8Accumulation::Truncated {
                add_truncated(a, b, &mut c, k, n);
            } else {
                add_floats(a, b, &mut c, k, n);
            }
            c.into_iter().map(|x| round(op.acc, x)).collect()
        }
        _ => old,
    };
    for (r, &register) in dst.iter().enumerate() {
        let values = warp.raw(register);
        for (lane, value) in values.iter_mut().enumerate() {
            *value = u64::from(new[place(r, lane)]);
        }
        warp.mark_written(register);
    }
}

fn hold(warp: &mut Warp, code: &Code<'_>, accumulators: &[u32], operands: &[u32], at: u32) {
    warp.holds.resize(code.registers as usize, Hold::Free);
    let group = warp.products.open;
    for &register in accumulators {
        warp.holds[register as usize] = Hold::Accumulator { group, at };
    }
    for &register in operands {
        warp.holds[register as usize] = Hold::Operand { group, at };
    }
}

impl Context<'_, '_> {
    pub fn wgmma_fence(&mut self) -> Outcome<Flow> {
        self.all_lanes("wgmma.fence")?;
        self.warp.dirty.fill(false);
        Ok(Flow::Next)
    }

    pub fn wgmma_commit(&mut self) -> Outcome<Flow> {
        self.all_lanes("wgmma.commit_group")?;
        let products = &mut self.warp.products;
        products.groups.push((products.open, products.open_count));
        products.open += 1;
        Ok(Flow::Next)
    }

    pub fn wgmma_wait(&mut self, pending: u32, dst: &[u32]) -> Outcome<Flow> {
        self.all_lanes("wgmma.wait_group")?;
        let index = self.index();
        let products = &mut self.warp.products;
        let done = products.groups.len().saturating_sub(pending as usize);
        if let Some((last, count)) = products.groups.drain(..done).next_back() {
            let component = self.state.clocks.wgmma_component(index);
            self.state.clocks.saw(index, component, count);
            let mut busy = false;
            for hold in &mut self.warp.holds {
                match hold {
                    Hold::Accumulator { group, .. } | Hold::Operand { group, .. } if *group <= last => {
                        *hold = Hold::Free;
                    }
                    Hold::Free => {}
                    _ => busy = true,
                }
            }
            if !busy {
                self.warp.holds.clear();
            }
        }
        for &register in dst {
            match self.warp.holds.get(register as usize) {
                None | Some(Hold::Free) => {}
                Some(Hold::Accumulator { at, .. } | Hold::Operand { at, .. }) => {
                    let name = self.cx.code.register_name(register);
                    let detail =
                        format!("wgmma.wait_group {pending} does not cover the wgmma that writes {name}");
                    let trouble = Trouble::new(FaultKind::WgmmaInFlight, detail).object(name);
                    return Err(trouble.other(*at));
                }
            }
        }
        self.warp.progressed();
        Ok(Flow::Next)
    }
}
