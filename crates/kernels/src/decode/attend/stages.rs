//! Tokens that pass through shared memory: each warp asks the copy engine for tiles of its own, as many ahead as it has
//! stages, so that no register waits for device memory. Scales are few, and go to registers as they are.

use sage_ptx::{Code, Mbarriers, Shared, Val};

use super::work::Work;
use super::{CacheAttendConfig, WARPS};
use crate::attention::Cursor;
use crate::decode::Storage;

/// A warp's stages, each with keys `[tile, pitch]` and, behind them, values `[tile, pitch]`.
pub(super) struct Stages<'k, 'w> {
    code: &'k Code,
    work: &'w Work<'k>,
    storage: Storage,
    page_heads: Shared<'k, i32>,
    /// Tokens of a tile, and those of them that lie side by side in a page.
    tile: usize,
    run: usize,
    count: usize,
    /// Stages of all warps, and the warp's.
    all: Shared<'k, u8>,
    memory: Shared<'k, u8>,
    /// Tell when stages of all warps are full, and the index of the warp's first.
    full: Mbarriers<'k>,
    first: Val<'k, i32>,
    cursor: Cursor<'k>,
}

/// Bytes of a stage of one warp.
pub(super) fn stage_bytes(storage: &Storage, tile: usize) -> usize {
    tile * storage.pitch() * (1 + storage.values.bytes())
}

impl<'k, 'w> Stages<'k, 'w> {
    /// The warp's stages, ready for use after the block's next barrier; none where tokens go straight to registers.
    pub fn new(
        config: &CacheAttendConfig,
        code: &'k Code,
        work: &'w Work<'k>,
        page_heads: Shared<'k, i32>,
    ) -> Option<Self> {
        let count = config.stages;
        if count == 0 {
            return None;
        }
        let bytes = count * stage_bytes(&config.storage, config.tile());
        let all = code.shared::<u8>("stages", WARPS * bytes);
        let full = code.mbarriers("stages_full", WARPS * count);
        code.when(code.thread().eq(0), || {
            (0..WARPS * count).for_each(|barrier| full.plus(barrier).init(1));
            code.fence_mbarriers();
        });
        Some(Stages {
            code,
            work,
            storage: config.storage,
            page_heads,
            tile: config.tile(),
            run: config.run(),
            count,
            all,
            memory: all.at(code.warp_index() * bytes as i32),
            full,
            first: code.warp_index() * count as i32,
            cursor: Cursor::new(code, count, "tokens"),
        })
    }

    /// The stages of all warps, once all have read their last.
    pub fn memory(&self) -> Shared<'k, f32> {
        self.all.cast()
    }

    /// From one of the warp's tiles to its next.
    fn step(&self) -> i32 {
        (WARPS * self.tile) as i32
    }

    /// Where the keys of the stage at the cursor lie.
    pub fn keys(&self) -> Shared<'k, u32> {
        self.stage(self.cursor.stage()).cast()
    }

    /// Where its values lie.
    pub fn values(&self) -> Shared<'k, u32> {
        self.stage(self.cursor.stage()).plus((self.tile * self.storage.pitch()) as i32).cast()
    }

    fn stage(&self, stage: Val<'k, i32>) -> Shared<'k, u8> {
        self.memory.at(stage * stage_bytes(&self.storage, self.tile) as i32)
    }

    /// Asks for as many tiles as there are stages, the first from token `start` on.
    pub fn start(&self, start: Val<'k, i32>) {
        for stage in 0..self.count as i32 {
            self.ask(start + stage * self.step(), self.code.constant(stage));
        }
    }

    /// Waits for the tile at the cursor.
    pub fn wait(&self) {
        self.full.at(self.first + self.cursor.stage()).wait(self.cursor.parity());
    }

    /// The warp has read the tile at the cursor, which starts at token `start`: its stage is for the next tile that has
    /// none, and the cursor moves on.
    pub fn release(&self, start: Val<'k, i32>) {
        self.code.warp_sync();
        self.ask(start + self.count as i32 * self.step(), self.cursor.stage());
        self.cursor.advance();
    }

    /// Asks for the tokens there are of a tile from token `start` on.
    fn ask(&self, start: Val<'k, i32>, stage: Val<'k, i32>) {
        let Stages { code, work, storage, .. } = *self;
        let there = (work.last - start).min(self.tile as i32);
        code.when(there.gt(0) & code.lane_index().eq(0), || {
            let (keys, pitch) = (self.stage(stage), storage.pitch() as i32);
            let values = keys.plus(self.tile as i32 * pitch);
            let value_pitch = pitch * storage.values.bytes() as i32;
            let full = self.full.at(self.first + stage);
            full.arrive_expecting(there * (pitch + value_pitch));
            for run in (0..self.tile as i32).step_by(self.run) {
                let of_run = (there - run).min(self.run as i32);
                let copy = || {
                    let first = start + run;
                    let page = (first >> storage.page_bits()) - work.first_page;
                    let row = work.pool.row(self.page_heads.at(page).load(), first);
                    let to = keys.plus(run * pitch).cast();
                    to.copy_bulk(work.pool.keys_of(row), of_run * pitch, &full);
                    let to = values.plus(run * value_pitch).cast();
                    to.copy_bulk(work.pool.values_of(row), of_run * value_pitch, &full);
                };
                if run == 0 { copy() } else { code.when(of_run.gt(0), copy) }
            }
        });
    }
}
