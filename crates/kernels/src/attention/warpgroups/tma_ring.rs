//! Tiles of K and V on their way through TMA, the tensor memory accelerator (Hopper's bulk tensor copies): a producer
//! asks for them, and a pipeline tells when they are there and when their stage is free again.

use sage_ptx::{BoxedTensor, Code, PanelMatrix, Shared, Val};

use super::bias_ring;
use crate::attention::config::{AttentionConfig, panel_row_bytes};
use crate::attention::mapped::MappedOperand;
use crate::attention::pipeline::{Cursor, Pipeline};
use crate::attention::place::Place;
use crate::operand::{Element, OperandSource};
use crate::sequence::KEY_TILE;

/// How an operand's tiles lie in shared memory, and where boxes of them come from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Form {
    element_bytes: usize,
    /// Rows of a panel, which are `row_bytes` long.
    pub rows: usize,
    pub row_bytes: usize,
    pub panels: usize,
    /// Whether ones stand behind the panels: columns of the product with P that are P's sums.
    has_ones: bool,
    source: BoxSource,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BoxSource {
    /// The caller's `[batch, heads, rows, head_dim]`: a panel is a box.
    Given,
    /// Rows of the workspace's tiles of [`KEY_TILE`] keys: such a part of a panel is a box.
    Rows,
    /// The workspace's transposed tiles: each is a panel.
    Transposed,
}

/// Bytes of a panel's rows of 16-bit elements.
const PANEL_BYTES: usize = 128;

impl Form {
    fn of_keys(config: &AttentionConfig) -> Form {
        let (columns, rows) = (config.key_columns(), config.tiling.tile_keys());
        let operand = config.operands.k;
        match operand.source {
            OperandSource::Given | OperandSource::Registers => Form::halves(columns, rows, BoxSource::Given),
            OperandSource::Workspace => {
                let row_bytes = panel_row_bytes(columns);
                Form {
                    element_bytes: 1,
                    rows,
                    row_bytes,
                    panels: columns / row_bytes,
                    has_ones: false,
                    source: BoxSource::Rows,
                }
            }
        }
    }

    fn of_values(config: &AttentionConfig) -> Form {
        let (columns, keys) = (config.value_columns(), config.tiling.tile_keys());
        let form = match (config.operands.v.element, config.operands.v.source) {
            (Element::E4M3, _) => Form {
                element_bytes: 1,
                rows: columns,
                row_bytes: KEY_TILE,
                panels: keys / KEY_TILE,
                has_ones: false,
                source: BoxSource::Transposed,
            },
            (_, OperandSource::Workspace) => Form::halves(columns, keys, BoxSource::Rows),
            (_, OperandSource::Given | OperandSource::Registers) => {
                Form::halves(columns, keys, BoxSource::Given)
            }
        };
        Form { has_ones: config.sums_by_mma(), ..form }
    }

    pub fn of_queries(config: &AttentionConfig) -> Form {
        let columns = config.head_dim.next_multiple_of(PANEL_BYTES / 2);
        Form::halves(columns, config.block_q(), BoxSource::Given)
    }

    fn halves(columns: usize, rows: usize, source: BoxSource) -> Form {
        let panels = 2 * columns / PANEL_BYTES;
        Form { element_bytes: 2, rows, row_bytes: PANEL_BYTES, panels, has_ones: false, source }
    }

    pub fn panel_bytes(&self) -> usize {
        self.rows * self.row_bytes
    }

    pub fn stage_bytes(&self) -> usize {
        self.copied_bytes() + self.ones_bytes()
    }

    /// Bytes of the ones: eight columns, as one more panel or, of transposed tiles, as further rows. Stages remain
    /// multiples of what descriptors ask for.
    fn ones_bytes(&self) -> usize {
        match (self.has_ones, self.source) {
            (false, _) => 0,
            (true, BoxSource::Transposed) => 1024,
            (true, _) => self.panel_bytes(),
        }
    }

    /// Bytes of a stage that are copied.
    fn copied_bytes(&self) -> usize {
        self.panels * self.panel_bytes()
    }

    /// Rows of a box.
    fn box_rows(&self) -> usize {
        match self.source {
            BoxSource::Given | BoxSource::Transposed => self.rows,
            BoxSource::Rows => KEY_TILE,
        }
    }

    pub fn columns(&self) -> usize {
        self.row_bytes / self.element_bytes
    }
}

/// Bytes of shared memory of a stage of the ring.
pub fn stage_bytes(config: &AttentionConfig) -> usize {
    Form::of_keys(config).stage_bytes() + Form::of_values(config).stage_bytes()
}

/// The same as [`mapped::boxed_tensor`](crate::attention::boxed_tensor) for kernels of warpgroups.
pub(in crate::attention) fn boxed_tensor(
    config: &AttentionConfig,
    operand: MappedOperand,
    (shape, [batch, head, row]): ([u64; 4], [i64; 3]),
    address: u64,
    workspace_tiles: usize,
) -> BoxedTensor {
    let form = match operand {
        MappedOperand::Keys => Form::of_keys(config),
        MappedOperand::Values => Form::of_values(config),
        MappedOperand::Queries => Form::of_queries(config),
    };
    let (columns, bytes) = (form.columns() as u32, form.element_bytes as u64);
    let rows = form.box_rows() as u32;
    let (shape, strides) = match form.source {
        BoxSource::Given => {
            // The stride of a dimension of one element means nothing, but must be a valid one.
            let stride = |stride: i64, size: u64| if size > 1 { stride as u64 * bytes } else { 16 };
            (shape, [stride(row, shape[1]), stride(head, shape[2]), stride(batch, shape[3])])
        }
        BoxSource::Rows => {
            let row = form.panels as u64 * u64::from(columns);
            let rows = (workspace_tiles * KEY_TILE) as u64;
            ([row, rows, 1, 1], [row * bytes, 16, 16])
        }
        BoxSource::Transposed => {
            let rows = (workspace_tiles * form.rows) as u64;
            ([u64::from(columns), rows, 1, 1], [u64::from(columns) * bytes, 16, 16])
        }
    };
    BoxedTensor {
        name: operand.map_name(),
        address,
        element_bytes: form.element_bytes,
        shape,
        strides,
        tile: [columns, rows, 1, 1],
        swizzle: form.row_bytes,
    }
}

/// One operand's stages.
pub(super) struct Stages<'k> {
    form: Form,
    memory: Shared<'k, u8>,
    map: Val<'k, u64>,
    pipeline: Pipeline<'k>,
}

/// The rings of both operands: each has a pipeline of its own, so that K's stage is free as soon as its scores are
/// known.
pub(super) struct TmaRing<'k, 'c> {
    code: &'k Code,
    config: &'c AttentionConfig,
    pub keys: Stages<'k>,
    pub values: Stages<'k>,
    /// Behind the stages of both: those of biases.
    pub memory_of_biases: Shared<'k, u8>,
}

impl<'k, 'c> TmaRing<'k, 'c> {
    /// Ready for use after the block's next barrier.
    pub fn new(code: &'k Code, config: &'c AttentionConfig, maps: [Val<'k, u64>; 2]) -> Self {
        let stages = config.tiling.stages();
        let bytes = stages * stage_bytes(config);
        let memory = code.shared::<u8>("tiles", bytes + stages * bias_ring::stage_bytes(config));
        let barriers = code.mbarriers("tiles_full_empty", 2 * Pipeline::barriers(stages));
        let of = |form: Form, map, first: usize, first_barrier: usize| Stages {
            form,
            memory: memory.plus(first as i32),
            map,
            pipeline: Pipeline::new(barriers.from(first_barrier), stages),
        };
        let [k_map, v_map] = maps;
        let of_keys = Form::of_keys(config);
        let keys = of(of_keys, k_map, 0, 0);
        let first_value = stages * of_keys.stage_bytes();
        let values = of(Form::of_values(config), v_map, first_value, Pipeline::barriers(stages));
        code.when(code.thread().eq(0), || {
            for operand in [&keys, &values] {
                operand.pipeline.init(config.tiling.warps() as u32);
            }
            code.fence_mbarriers();
        });
        let ring = TmaRing { code, config, keys, values, memory_of_biases: memory.plus(bytes as i32) };
        ring.write_ones();
        ring
    }

    /// The ones beside V, which no copy touches.
    fn write_ones(&self) {
        let (code, form) = (self.code, self.values.form);
        if !form.has_ones {
            return;
        }
        let word = match self.config.operands.v.element {
            Element::BF16 => 0x3f80_3f80u32,
            Element::E4M3 => 0x3838_3838,
            _ => 0x3c00_3c00,
        };
        let words = code.constant(word);
        for stage in 0..self.config.tiling.stages() {
            let first = stage * form.stage_bytes() + form.copied_bytes();
            let memory = self.values.memory.plus(first as i32);
            let step = 16 * self.config.block_threads() as i32;
            code.range_by(code.thread() * 16, form.ones_bytes() as i32, step, |byte| {
                memory.at(byte).cast::<u32>().store_vector([words; 4]);
            });
        }
        code.fence_async_proxy();
    }

    /// The producer's part: asks for tile `tile` of the sequence as soon as a stage is free.
    pub fn load(&self, place: &Place<'k>, tile: Val<'k, i32>, cursor: &Cursor<'k>) {
        for operand in [&self.keys, &self.values] {
            operand.load(self.config, place, tile, cursor);
        }
        cursor.advance();
    }

    /// Writes zeros to the rows of V for whose index in the tile `hides` holds: they may hold anything, and products
    /// with zeros must be zeros. All consumers call it, and only for a tile of V as given that has such rows.
    pub fn clear_values(&self, hides: impl Fn(Val<'k, i32>) -> Val<'k, bool>, cursor: &Cursor<'k>) {
        let (code, form) = (self.code, self.values.form);
        let row_words = form.row_bytes / 16;
        let panel = form.panel_bytes() as i32;
        let zero = code.constant(0u32);
        let stage = self.values.memory.at(cursor.stage() * form.stage_bytes() as i32);
        let last = (form.rows * row_words) as i32;
        code.range_by(code.thread(), last, self.config.threads() as i32, |chunk| {
            code.when(hides(chunk.split_index(row_words).0), || {
                for index in 0..form.panels as i32 {
                    stage.at(chunk * 16).plus(index * panel).cast::<u32>().store_vector([zero; 4]);
                }
            });
        });
        code.fence_async_proxy();
        self.config.barrier(code);
    }
}

impl<'k> Stages<'k> {
    fn load(&self, config: &AttentionConfig, place: &Place<'k>, tile: Val<'k, i32>, cursor: &Cursor<'k>) {
        let code = tile.code();
        let form = self.form;
        let stage = self.pipeline.wait_empty(cursor);
        let full = self.pipeline.full(stage);
        full.arrive_expecting(form.copied_bytes() as i32);
        let memory = self.memory.at(stage * form.stage_bytes() as i32);
        let parts = config.tiling.tile_keys() / KEY_TILE;
        // A tile of the workspace that is not the sequence's is another's: the last one stands in for it, hidden as it
        // is.
        let in_workspace = |part: usize| {
            let own = tile * parts as i32 + part as i32;
            let last = place.sequence.kv_len.div_ceil(KEY_TILE) - 1;
            place.first_key_tile + if part == 0 { own } else { own.min(last) }
        };
        let zero = code.constant(0);
        for panel in 0..form.panels {
            let column = code.constant((panel * form.columns()) as i32);
            let to = memory.plus((panel * form.panel_bytes()) as i32);
            match form.source {
                BoxSource::Given => {
                    let row = place.sequence.kv_start + tile * config.tiling.tile_keys() as i32;
                    to.copy_tensor(self.map, &[column, row, place.kv_head, place.sequence.batch], &full);
                }
                BoxSource::Rows => {
                    for part in 0..parts {
                        let row = in_workspace(part) * KEY_TILE as i32;
                        let to = to.plus((part * KEY_TILE * form.row_bytes) as i32);
                        to.copy_tensor(self.map, &[column, row, zero, zero], &full);
                    }
                }
                BoxSource::Transposed => {
                    let row = in_workspace(panel) * form.rows as i32;
                    to.copy_tensor(self.map, &[zero, row, zero, zero], &full);
                }
            }
        }
    }

    /// A consumer's part: waits for the tile at the cursor.
    pub fn wait(&self, cursor: &Cursor<'k>) {
        self.pipeline.wait_full(cursor);
    }

    /// The tile at the cursor.
    pub fn matrix(&self, cursor: &Cursor<'k>) -> PanelMatrix<'k> {
        PanelMatrix::new(self.memory, self.form.rows, self.form.row_bytes)
            .at(cursor.stage(), self.form.stage_bytes())
    }

    /// A consumer's part: the warp is done with the tile at the cursor.
    pub fn release(&self, lane: Val<'k, i32>, cursor: &Cursor<'k>) {
        lane.code().when(lane.eq(0), || self.pipeline.release(cursor.stage()));
    }
}
