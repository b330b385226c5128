//! Queries on their way through TMA: the producer asks for those of the next piece of work as soon as no consumer needs
//! the last ones.
//!
//! A lane that reads its own words of rows in device memory touches 16 bytes of each of eight rows at once, which took
//! 1.7 microseconds of a piece of 192 rows for every 64 channels: as long as two to four tiles of keys.

use sage_ptx::{CHUNK_BYTES, Code, PanelMatrix, SLOT_ROWS, Shared, SharedTile, Val, lane_row};

use super::tma_ring::Form;
use crate::attention::config::AttentionConfig;
use crate::attention::pipeline::{Cursor, Pipeline};
use crate::attention::place::Place;
use crate::attention::queries::load_words;

/// The one stage of queries, in the caller's element type.
pub(super) struct QueryStage<'k> {
    rows: StagedRows<'k>,
    map: Val<'k, u64>,
    pipeline: Pipeline<'k>,
}

/// A block's query rows in shared memory, in panels.
#[derive(Clone, Copy)]
pub(in crate::attention) struct StagedRows<'k> {
    form: Form,
    memory: Shared<'k, u8>,
}

impl<'k> QueryStage<'k> {
    /// Ready for use after the block's next barrier.
    pub fn new(code: &'k Code, config: &AttentionConfig, map: Val<'k, u64>) -> Self {
        let form = Form::of_queries(config);
        let memory = code.shared::<u8>("staged_queries", form.stage_bytes());
        let pipeline = Pipeline::new(code.mbarriers("queries_full_empty", Pipeline::barriers(1)), 1);
        code.when(code.thread().eq(0), || {
            pipeline.init(config.tiling.warps() as u32);
            code.fence_mbarriers();
        });
        QueryStage { rows: StagedRows { form, memory }, map, pipeline }
    }

    /// Where a thread stands.
    pub fn cursor(code: &'k Code, name: &str) -> Cursor<'k> {
        Cursor::new(code, 1, name)
    }

    /// The producer's part: asks for the queries of a piece of work as soon as the stage is free. Rows that are not the
    /// sequence's may come along, of which nothing is kept.
    pub fn load(&self, place: &Place<'k>, cursor: &Cursor<'k>) {
        let StagedRows { form, memory } = self.rows;
        let full = self.pipeline.full(self.pipeline.wait_empty(cursor));
        full.arrive_expecting(form.stage_bytes() as i32);
        let row = place.sequence.q_start + place.first_row;
        for panel in 0..form.panels {
            let column = row.code().constant((panel * form.columns()) as i32);
            let to = memory.plus((panel * form.panel_bytes()) as i32);
            to.copy_tensor(self.map, &[column, row, place.head, place.sequence.batch], &full);
        }
        cursor.advance();
    }

    /// A consumer's part: waits for the queries of its piece of work.
    pub fn wait(&self, cursor: &Cursor<'k>) -> &StagedRows<'k> {
        self.pipeline.wait_full(cursor);
        &self.rows
    }

    /// A consumer's part: the warp is done with them.
    pub fn release(&self, lane: Val<'k, i32>, cursor: &Cursor<'k>) {
        let code = lane.code();
        code.warp_sync();
        code.when(lane.eq(0), || self.pipeline.release(cursor.stage()));
        cursor.advance();
    }
}

impl<'k> StagedRows<'k> {
    /// The warpgroup's rows as `wgmma` reads them.
    pub fn matrix(&self, warp: Val<'k, i32>) -> PanelMatrix<'k> {
        let Form { rows, row_bytes, .. } = self.form;
        PanelMatrix::new(self.memory, rows, row_bytes).at(warp >> 2, 64 * row_bytes)
    }

    /// The lane's words `index` of the row in slot `slot`: those of `per` neighbouring channels, of which each lane of a
    /// quad has some; zeros where the head ends.
    pub fn words(&self, place: &Place<'k>, slot: usize, index: usize, per: usize) -> Vec<Val<'k, u32>> {
        let code = place.lane.code();
        // Words of a lane, and 16-byte chunks of a quad.
        let words = per / 2;
        let chunks_of_row = self.form.row_bytes / CHUNK_BYTES;
        let (panel, chunk) = (index * words / chunks_of_row, index * words % chunks_of_row);
        if panel >= self.form.panels {
            return vec![code.constant(0); words];
        }
        let panel = self.memory.plus((panel * self.form.panel_bytes()) as i32);
        let tile = SharedTile::new(panel, self.form.row_bytes);
        let (of_quad, within) = ((place.lane & 3) * words as i32).split_index(4);
        let row = place.warp * 16 + lane_row(place.lane);
        load_words(tile.chunk(row, of_quad).step(SLOT_ROWS * slot, chunk).cast::<u32>().at(within), words)
    }
}
