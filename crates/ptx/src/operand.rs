//! Operands of whole rows of A: a fragment for each strip of 16 rows and each step of 32 bytes of the depth.

use std::marker::PhantomData;

use crate::code::Code;
use crate::fragment::{CHUNK_BYTES, FragmentA, MmaElement, RoundedElement, SharedTile};
use crate::pointer::Shared;
use crate::rows::{Rows, SLOT_ROWS};
use crate::scalar::Phantom;
use crate::tile::Tile;
use crate::value::Val;
use crate::var::Var;

/// The operand A of a warp's rows, which is read for each step.
#[derive(Clone, Debug)]
pub struct OperandTile<'k> {
    strips: usize,
    steps: usize,
    words: Words<'k>,
}

/// Where the lane's words are: four for each step of each strip.
#[derive(Clone, Debug)]
enum Words<'k> {
    Registers(Vec<[Val<'k, u32>; 4]>),
    /// No other lane reads them.
    Memory(Shared<'k, u32>),
}

impl<'k> OperandTile<'k> {
    /// The operand of rows whose neighbouring elements `pack` puts into words: `rows` has what becomes the lane's word
    /// of every 16 bytes.
    #[track_caller]
    pub fn of_rows<R>(rows: &Rows<Vec<R>>, pack: impl Fn(usize, &R) -> Val<'k, u32>) -> Self {
        let (strips, steps) = (rows.slots() / 2, rows.iter().next().map_or(0, |row| row.len() / 2));
        let mut words = Vec::with_capacity(strips * steps);
        for strip in 0..strips {
            for step in 0..steps {
                let word = |half: usize, depth: usize| {
                    let slot = 2 * strip + half;
                    pack(slot, &rows[slot][2 * step + depth])
                };
                words.push([word(0, 0), word(1, 0), word(0, 1), word(1, 1)]);
            }
        }
        OperandTile { strips, steps, words: Words::Registers(words) }
    }

    /// Words of a lane.
    pub fn lane_words(&self) -> usize {
        4 * self.strips * self.steps
    }

    #[track_caller]
    fn fragment_words(&self, strip: usize, step: usize) -> [Val<'k, u32>; 4] {
        let index = strip * self.steps + step;
        match &self.words {
            Words::Registers(words) => words[index],
            Words::Memory(words) => words.plus(4 * index as i32).load_vector(),
        }
    }

    /// The fragment of each strip at step `step`.
    #[track_caller]
    pub fn fragments<E: MmaElement>(&self, step: usize) -> Vec<FragmentA<'k, E>> {
        (0..self.strips).map(|strip| FragmentA::new(self.fragment_words(strip, step))).collect()
    }

    /// The same operand kept in shared memory: `memory` has [`OperandTile::lane_words`] for each lane.
    #[track_caller]
    pub fn in_memory(self, memory: Shared<'k, u32>, thread: Val<'k, i32>) -> Self {
        let memory = memory.at(thread * self.lane_words() as i32);
        for strip in 0..self.strips {
            for step in 0..self.steps {
                let words = self.fragment_words(strip, step);
                memory.plus(4 * (strip * self.steps + step) as i32).store_vector(words);
            }
        }
        OperandTile { words: Words::Memory(memory), ..self }
    }

    /// Stores a strip where `wgmma` reads it: in the panels of a [`PanelMatrix`](crate::PanelMatrix) at `memory`, which
    /// have `rows` rows of `row_bytes`. The lane's first row there is `row`.
    #[track_caller]
    pub fn store_panels(
        &self,
        memory: Shared<'k, u8>,
        [rows, row_bytes]: [usize; 2],
        row: Val<'k, i32>,
        lane: Val<'k, i32>,
    ) {
        for step in 0..self.steps {
            for (half, pair) in self.fragment_words(0, step).chunks(2).enumerate() {
                let chunk = 2 * step + half;
                let panel = memory.plus((chunk * CHUNK_BYTES / row_bytes * rows * row_bytes) as i32);
                let panel = SharedTile::new(panel, row_bytes);
                let first = panel.chunk(row, (chunk % (row_bytes / CHUNK_BYTES)) as i32);
                for (slot, &word) in pair.iter().enumerate() {
                    first.step(SLOT_ROWS * slot, 0).cast::<u32>().at(lane & 3).store(word);
                }
            }
        }
    }
}

/// The operand A of one strip in variables: what products in flight may still read while the next one's is computed.
#[derive(Clone, Debug)]
pub struct OperandVars<'k, E> {
    /// The words of each step's fragment.
    words: Vec<[Var<'k, u32>; 4]>,
    element: Phantom<E>,
}

impl<'k, E: RoundedElement> OperandVars<'k, E> {
    /// An operand as deep as `columns` of sums, without values as yet.
    pub fn new(code: &'k Code, columns: usize) -> Self {
        let words = (0..columns / E::DEPTH).map(|_| std::array::from_fn(|_| Var::new(code))).collect();
        OperandVars { words, element: PhantomData }
    }

    /// Sets it to a tile of one strip, rounded.
    #[track_caller]
    pub fn set(&self, tile: &Tile<Val<'k, f32>>) {
        for (step, vars) in self.words.iter().enumerate() {
            for fragment in tile.operand::<E>(step) {
                vars.iter().zip(fragment.words()).for_each(|(var, word)| var.set(word));
            }
        }
    }

    /// The fragment of each step.
    #[track_caller]
    pub fn fragments(&self) -> Vec<FragmentA<'k, E>> {
        self.words.iter().map(|vars| FragmentA::new(vars.map(|var| var.get()))).collect()
    }
}
