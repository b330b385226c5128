//! Where a lane's words of tokens are from when they are asked for until they are multiplied: its registers, or memory of
//! its own in the block's, which holds several tiles on their way.

use sage_ptx::{Code, Global, Shared, Val, Var};

use super::WARPS;

/// A lane's pieces of a tile: so many chunks of keys and of values, and scales.
#[derive(Clone, Copy)]
pub(super) struct Pieces {
    pub keys: usize,
    pub values: usize,
    /// Words of a chunk of values.
    pub value_words: usize,
    pub scales: usize,
}

/// Words of a chunk of keys.
const KEY_WORDS: usize = 4;

impl Pieces {
    /// Bytes of the pieces of all lanes of a warp.
    fn bytes(&self) -> usize {
        32 * 4 * (KEY_WORDS * self.keys + self.value_words * self.values + self.scales)
    }

    /// Bytes of so many tiles of a block.
    pub fn ring_bytes(&self, stages: usize) -> usize {
        WARPS * stages * self.bytes()
    }
}

/// What a lane holds of tiles.
pub(super) enum Room<'k> {
    /// One tile, whose pieces are asked for again as soon as they were multiplied.
    Registers { keys: Vec<Vec<Var<'k, u32>>>, values: Vec<Vec<Var<'k, u32>>>, scales: Vec<Var<'k, f32>> },
    /// Tiles in shared memory. Lanes read what they have copied themselves, so that no barrier is needed.
    Ring(Ring<'k>),
}

pub(super) struct Ring<'k> {
    code: &'k Code,
    pieces: Pieces,
    stages: usize,
    /// Where the lane's first chunk of a key, of a value, and its first scale lie in the first stage.
    keys: Shared<'k, u32>,
    values: Shared<'k, u32>,
    scales: Shared<'k, f32>,
    /// Bytes from the first stage to the one in use.
    stage: Var<'k, i32>,
}

impl<'k> Room<'k> {
    /// For so many tiles in shared memory, or one in registers where there are none.
    pub fn new(code: &'k Code, pieces: Pieces, stages: usize) -> Self {
        if stages == 0 {
            let chunks = |count: usize, words: usize| {
                (0..count).map(|_| (0..words).map(|_| Var::new(code)).collect()).collect()
            };
            return Room::Registers {
                keys: chunks(pieces.keys, KEY_WORDS),
                values: chunks(pieces.values, pieces.value_words),
                scales: (0..pieces.scales).map(|_| Var::new(code)).collect(),
            };
        }
        let memory = code.shared::<u8>("ring", pieces.ring_bytes(stages));
        let warp = memory.at(code.warp_index() * (stages * pieces.bytes()) as i32);
        let of_lane = |first: usize, words: usize| {
            warp.plus((32 * 4 * first) as i32).at(code.lane_index() * (4 * words) as i32)
        };
        let values = KEY_WORDS * pieces.keys;
        let scales = values + pieces.value_words * pieces.values;
        Room::Ring(Ring {
            code,
            pieces,
            stages,
            keys: of_lane(0, KEY_WORDS).cast(),
            values: of_lane(values, pieces.value_words).cast(),
            scales: of_lane(scales, 1).cast(),
            stage: code.var(0).named("stage"),
        })
    }

    /// Tiles from one to the next that takes its place.
    pub fn tiles(&self) -> usize {
        match self {
            Room::Registers { .. } => 1,
            Room::Ring(ring) => ring.stages,
        }
    }

    /// Waits for the tile in use.
    pub fn wait(&self) {
        if let Room::Ring(ring) = self {
            ring.code.wait_copies(ring.stages as u32 - 1);
        }
    }

    /// Ends what is asked for of a tile, and goes on to the next.
    pub fn advance(&self) {
        let Room::Ring(Ring { code, pieces, stages, stage, .. }) = self else { return };
        code.commit_copies();
        let next = stage.get() + pieces.bytes() as i32;
        stage.set(next.eq((stages * pieces.bytes()) as i32).select(0, next));
    }

    /// Asks for a chunk of a key, for the tile that takes the place of the one in use.
    pub fn load_key(&self, index: usize, from: Global<'k, u32>) {
        match self {
            Room::Registers { keys, .. } => load(&keys[index], from),
            Room::Ring(ring) => ring.chunk(ring.keys, index, KEY_WORDS).copy_async(from, 16, 16),
        }
    }

    /// The same of a value.
    pub fn load_value(&self, index: usize, from: Global<'k, u32>) {
        match self {
            Room::Registers { values, .. } => load(&values[index], from),
            Room::Ring(ring) => {
                let words = ring.pieces.value_words;
                ring.chunk(ring.values, index, words).copy_async(from, 4 * words as u8, 4 * words as i32);
            }
        }
    }

    /// The same of a scale.
    pub fn load_scale(&self, index: usize, from: Global<'k, f32>) {
        match self {
            Room::Registers { scales, .. } => from.load_streaming_into([scales[index]]),
            Room::Ring(ring) => ring.scale(index).copy_async(from, 4, 4),
        }
    }

    /// The words of a chunk of a key of the tile in use.
    pub fn key(&self, index: usize) -> Vec<Val<'k, u32>> {
        match self {
            Room::Registers { keys, .. } => keys[index].iter().map(|word| word.get()).collect(),
            Room::Ring(ring) => ring.chunk(ring.keys, index, KEY_WORDS).load_vector::<KEY_WORDS>().to_vec(),
        }
    }

    /// The same of a value.
    pub fn value(&self, index: usize) -> Vec<Val<'k, u32>> {
        match self {
            Room::Registers { values, .. } => values[index].iter().map(|word| word.get()).collect(),
            Room::Ring(ring) => {
                let chunk = ring.chunk(ring.values, index, ring.pieces.value_words);
                if ring.pieces.value_words == 2 {
                    chunk.load_vector::<2>().to_vec()
                } else {
                    chunk.load_vector::<4>().to_vec()
                }
            }
        }
    }

    /// A scale of the tile in use.
    pub fn scale(&self, index: usize) -> Val<'k, f32> {
        match self {
            Room::Registers { scales, .. } => scales[index].get(),
            Room::Ring(ring) => ring.scale(index).load(),
        }
    }
}

impl<'k> Ring<'k> {
    /// The lane's chunk `index` of the stage in use, where the first lies at `first`.
    fn chunk(&self, first: Shared<'k, u32>, index: usize, words: usize) -> Shared<'k, u32> {
        let stage = first.cast::<u8>().at(self.stage.get()).cast::<u32>();
        stage.plus((32 * words * index) as i32)
    }

    fn scale(&self, index: usize) -> Shared<'k, f32> {
        self.scales.cast::<u8>().at(self.stage.get()).cast::<f32>().plus(32 * index as i32)
    }
}

/// Loads a chunk of two or four words.
fn load<'k>(words: &[Var<'k, u32>], from: Global<'k, u32>) {
    match *words {
        [a, b] => from.load_streaming_into([a, b]),
        [a, b, c, d] => from.load_streaming_into([a, b, c, d]),
        _ => unreachable!("chunks are of 8 or 16 bytes"),
    }
}
