//! Which array each byte of a block's shared memory belongs to.

use sage_ptx::Program;

use crate::fault::{FaultKind, Outcome, Trouble};

/// Address of the first byte, so that null is no address; a multiple of every alignment in use.
pub(crate) const BASE: u32 = 1024;

/// Which array each word of the program's shared memory belongs to.
#[derive(Debug)]
pub(crate) struct Layout<'a> {
    program: &'a Program,
    pub bytes: u32,
    /// Index of the array, by word; `u16::MAX` is none.
    home: Vec<u16>,
}

impl<'a> Layout<'a> {
    /// The layout of a [valid](Program::validate) program.
    pub fn new(program: &'a Program) -> Layout<'a> {
        let bytes = program.shared_bytes();
        let mut home = vec![u16::MAX; bytes.div_ceil(4) as usize];
        let end_of =
            |i: u16| program.shared.get(usize::from(i)).map_or(0, |array| array.offset + array.bytes);
        for (i, array) in program.shared.iter().enumerate() {
            let words = (array.offset / 4) as usize..(array.offset + array.bytes).div_ceil(4) as usize;
            for place in home.get_mut(words).into_iter().flatten() {
                // Where arrays share their place in turns, the one that reaches further is the home.
                if end_of(*place) < array.offset + array.bytes {
                    *place = i as u16;
                }
            }
        }
        Layout { program, bytes, home }
    }

    /// Offset in the block's shared memory of an access that stays in one array.
    pub fn offset(&self, address: u32, bytes: u32) -> Outcome<usize> {
        let offset = address.wrapping_sub(BASE);
        let home = self.home.get((offset / 4) as usize);
        if let Some(array) = home.and_then(|&i| self.program.shared.get(usize::from(i)))
            && u64::from(offset) + u64::from(bytes) <= u64::from(array.offset) + u64::from(array.bytes)
        {
            return Ok(offset as usize);
        }
        Err(self.outside(address, bytes))
    }

    #[cold]
    fn outside(&self, address: u32, bytes: u32) -> Box<Trouble> {
        let offset = i64::from(address) - i64::from(BASE);
        let distance =
            |start: i64, end: i64| if offset < start { start - offset } else { (offset - end).max(0) };
        let nearest = self.program.shared.iter().min_by_key(|array| {
            distance(i64::from(array.offset), i64::from(array.offset) + i64::from(array.bytes))
        });
        let Some(array) = nearest else {
            let detail =
                format!("{bytes} bytes at shared address {address:#x}: the kernel has no shared memory");
            return Trouble::new(FaultKind::OutOfBounds, detail);
        };
        let detail = format!(
            "{bytes} bytes at offset {} of shared array `{}`, which has {} bytes",
            offset - i64::from(array.offset),
            array.name,
            array.bytes
        );
        Trouble::new(FaultKind::OutOfBounds, detail).object(&array.name)
    }

    /// `` `tile` + 16 ``, and the array's name.
    pub fn place(&self, address: u32) -> (String, String) {
        let offset = address.wrapping_sub(BASE);
        let array =
            self.home.get((offset / 4) as usize).and_then(|&i| self.program.shared.get(usize::from(i)));
        match array {
            Some(array) => {
                (format!("`{}` + {}", array.name, offset.wrapping_sub(array.offset)), array.name.clone())
            }
            None => (format!("shared address {address:#x}"), String::new()),
        }
    }
}
