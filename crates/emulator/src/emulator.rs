//! The device: buffers, and launches.

use bytemuck::{NoUninit, Pod};
use sage_ptx::{Arg, Invalid, Program};

use crate::decode::Code;
use crate::fault::{Failure, Fault, FaultKind, Outcome, Trouble};
use crate::machine::{Global, Launch, Layout, MAX_BYTES};
use crate::options::EmulatorOptions;
use crate::report::Report;
use crate::schedule;
use crate::tensor_map::TensorMap;

/// A GPU on the CPU: global memory, and launches that check everything.
#[derive(Debug, Default)]
pub struct Emulator {
    global: Global,
    options: EmulatorOptions,
}

/// A buffer in an emulator's global memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Buffer {
    index: usize,
    address: u64,
    bytes: usize,
}

impl Buffer {
    /// Address of the first byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// As an argument: the address.
    pub fn arg(&self) -> Arg {
        Arg::Pointer(self.address)
    }
}

impl From<Buffer> for Arg {
    fn from(buffer: Buffer) -> Arg {
        buffer.arg()
    }
}

impl Emulator {
    /// With the default options.
    pub fn new() -> Emulator {
        Emulator::default()
    }

    /// With other options.
    pub fn with_options(options: EmulatorOptions) -> Emulator {
        Emulator { global: Global::default(), options }
    }

    /// The options, which later launches follow.
    pub fn options_mut(&mut self) -> &mut EmulatorOptions {
        &mut self.options
    }

    /// A buffer that holds `data`, at a multiple of 256.
    pub fn buffer<T: NoUninit>(&mut self, name: &str, data: &[T]) -> Buffer {
        self.buffer_at(name, data, 0)
    }

    /// A buffer that holds `data`, `offset` bytes beyond a multiple of 256: a tensor that begins anywhere.
    pub fn buffer_at<T: NoUninit>(&mut self, name: &str, data: &[T], offset: u32) -> Buffer {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let buffer = self.uninitialized_at(name, bytes.len(), offset);
        self.global.fill(buffer.index, bytes);
        buffer
    }

    /// A buffer that must be written before it is read.
    ///
    /// # Panics
    ///
    /// If it has more than 4 GiB.
    pub fn uninitialized(&mut self, name: &str, bytes: usize) -> Buffer {
        self.uninitialized_at(name, bytes, 0)
    }

    /// As [`Emulator::uninitialized`], `offset` bytes beyond a multiple of 256.
    ///
    /// # Panics
    ///
    /// If it has more than 4 GiB.
    pub fn uninitialized_at(&mut self, name: &str, bytes: usize, offset: u32) -> Buffer {
        assert!(bytes <= MAX_BYTES, "buffer `{name}`: {bytes} bytes, at most {MAX_BYTES}");
        let index = self.global.allocate(name, bytes, u64::from(offset));
        Buffer { index, address: self.global.address(index), bytes: self.global.len(index) }
    }

    /// Overwrites a buffer from its start.
    pub fn write<T: NoUninit>(&mut self, buffer: Buffer, data: &[T]) {
        self.global.fill(buffer.index, bytemuck::cast_slice(data));
    }

    /// The elements of a buffer; bytes that nobody wrote are zeros. A last element that is not whole is left out.
    pub fn read<T: Pod>(&self, buffer: Buffer) -> Vec<T> {
        let (bytes, _) = self.global.dump(buffer.index);
        let mut elements = vec![T::zeroed(); bytes.len() / size_of::<T>().max(1)];
        let to: &mut [u8] = bytemuck::cast_slice_mut(&mut elements);
        let len = to.len();
        to.copy_from_slice(&bytes[..len]);
        elements
    }

    /// Bytes of a buffer that were written, by the host or by a kernel.
    pub fn written_bytes(&self, buffer: Buffer) -> usize {
        self.global.dump(buffer.index).1
    }

    /// A tensor map as an argument, for bulk tensor copies.
    pub fn tensor_map(&self, map: &TensorMap) -> Arg {
        map.arg()
    }

    /// Runs a program for every block of a grid.
    ///
    /// # Errors
    ///
    /// Whatever the program did wrong, and arguments that do not fit it.
    pub fn launch(&self, program: &Program, grid: [u32; 3], args: &[Arg]) -> Result<Report, Failure> {
        let failure = |faults| Failure { program: program.name.clone(), faults };
        let prepared =
            self.prepare(program, grid, args).map_err(|trouble| failure(vec![not_begun(*trouble)]))?;
        let (stats, faults) = schedule::run(&prepared);
        if faults.is_empty() { Ok(Report::new(&stats, &prepared)) } else { Err(failure(faults)) }
    }

    fn prepare<'a>(&'a self, program: &'a Program, grid: [u32; 3], args: &'a [Arg]) -> Outcome<Launch<'a>> {
        let wrong = |detail: String| Err(Trouble::new(FaultKind::Arguments, detail));
        program.validate().map_err(invalid)?;
        let [x, y, z] = grid;
        if grid.contains(&0) || x > i32::MAX as u32 || y > 65535 || z > 65535 {
            return wrong(format!(
                "grid of {grid:?} blocks, expected at least 1 and at most 2^31 - 1, 65535, 65535"
            ));
        }
        if args.len() != program.params.len() {
            let names: Vec<&str> = program.params.iter().map(|param| param.name.as_str()).collect();
            return wrong(format!(
                "{} arguments, expected {}: {}",
                args.len(),
                names.len(),
                names.join(", ")
            ));
        }
        for (param, arg) in program.params.iter().zip(args) {
            if param.ty != arg.ty() {
                let detail = format!("argument `{}` is {:?}, expected {:?}", param.name, arg.ty(), param.ty);
                return Err(Trouble::new(FaultKind::Arguments, detail).object(&param.name));
            }
        }
        Ok(Launch {
            code: Code::new(program),
            layout: Layout::new(program),
            global: &self.global,
            args,
            grid,
            options: &self.options,
        })
    }
}

fn invalid(error: Invalid) -> Box<Trouble> {
    let detail = format!("{} is {}, expected {}", error.what, error.found, error.wanted);
    let trouble = Trouble::new(FaultKind::InvalidProgram, detail);
    match error.at {
        Some(at) => trouble.statement(at),
        None => trouble,
    }
}

/// A fault from before the first instruction.
fn not_begun(trouble: Trouble) -> Fault {
    Fault {
        kind: trouble.kind,
        block: [0; 3],
        warp: 0,
        lanes: 0,
        at: trouble.statement,
        instruction: "nothing was run".to_owned(),
        object: trouble.object,
        other: None,
        detail: trouble.detail,
    }
}
