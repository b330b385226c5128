//! Lists of tiles of keys, where an explicit mask or a block mask says which tiles are seen.

use sage_ptx::Arg;

use super::call::{ForwardCall, ForwardPass, slot};
use super::masks;
use super::request::Extent;
use super::tensors::Tensors;
use crate::attention::{AttentionArgs, AttentionConfig, ENTRIES_BEHIND, MaskForm, TileListArgs};
use crate::pass::{Addresses, Slot};
use crate::preprocess::SEEN_WORDS;
use crate::sequence::{KEY_TILE, Lengths};
use crate::sparse::{
    CLASS_ROWS, KeyMaskArgs, KeyMaskConfig, ListTilesArgs, ListTilesConfig, MaskAccess, PackMaskArgs,
    PackMaskConfig, Packing,
};

/// Arguments of an attention kernel that takes lists.
pub(super) type ListedArgs = [Arg; AttentionArgs::COUNT + TileListArgs::COUNT];

/// Where the lists for an attention kernel lie.
#[derive(Clone, Copy)]
pub(super) struct TileLists {
    counts: Slot,
    lists: Slot,
    list_stride: usize,
    q_tiles: usize,
    extent: Extent,
    /// Sequences and heads with lists of their own.
    sequences: usize,
    heads: usize,
    packed: Option<PackedMask>,
    /// Which keys some query sees.
    seen: Slot,
}

/// Where the classes and words of masks lie.
#[derive(Clone, Copy)]
struct PackedMask {
    classes: Slot,
    words: Slot,
    packing: Option<Packing>,
    extent: Extent,
    /// Heads with a mask of their own.
    heads: usize,
    /// Rows with a mask of their own.
    rows: usize,
    keys: usize,
}

impl TileLists {
    /// Adds the launches that make the lists for an attention kernel.
    pub fn make(call: &ForwardCall, config: &AttentionConfig, pass: &mut ForwardPass) -> Self {
        let (problem, request) = (&call.problem, &call.request);
        // Where no launch has said which keys are seen, this one is to.
        if request.mask != MaskForm::None && pass.find(slot::SEEN) == Slot::NONE {
            return TileLists::of_key_mask(*call, config, pass);
        }
        let packed = PackedMask::pack(call, config, pass);
        // Blocks that end within tiles are in the classes.
        let whole_blocks = problem.blocks.filter(|_| !config.block_edges);
        let mut extent = Extent { batches: request.lengths != Lengths::Dense, ..Extent::NONE };
        if let Some(packed) = packed {
            extent = extent.or(packed.extent);
        }
        if whole_blocks.is_some() {
            extent = extent.or(request.blocks_extent);
        }
        let seen = pass.find(slot::SEEN);
        let made = TileLists::reserve(call, config, (extent, packed, seen), pass);
        let TileLists { q_tiles, sequences, heads, .. } = made;
        let (block_q, tile_keys) = (config.block_q(), config.tiling.tile_keys());
        let list = ListTilesConfig {
            block_q,
            tile_keys,
            classes: packed.is_some(),
            blocks: whole_blocks.is_some(),
            lengths: request.lengths,
            masked: request.mask != MaskForm::None,
            clears: config.clears_values(),
        };
        let call = *call;
        let [blocks_q, blocks_k] = whole_blocks.map_or([1; 2], |[q, k]| [q / block_q, k / tile_keys]);
        pass.launch(list, move |at, launch| {
            let args = ListTilesArgs {
                blocks_q: blocks_q as i32,
                blocks_k: blocks_k as i32,
                ..made.list(&call, at)
            };
            launch(list.grid(q_tiles, sequences * heads), &args.args(), &[]);
        });
        made
    }

    /// Adds the launch that makes them of a mask of keys alone, with the words of keys that are seen.
    fn of_key_mask(call: ForwardCall, config: &AttentionConfig, pass: &mut ForwardPass) -> Self {
        let (problem, extent) = (call.problem, call.request.mask_extent);
        let packed = PackedMask::reserve(&call, config.packing(), extent, pass);
        let seen = masks::seen_slot(&call, pass);
        let made = TileLists::reserve(&call, config, (extent, Some(packed), seen), pass);
        let key_mask = KeyMaskConfig {
            mask: call.request.mask,
            packing: config.packing(),
            tile_keys: config.tiling.tile_keys(),
            clears: config.clears_values(),
        };
        let clears = pass.clears_counters();
        pass.launch(key_mask, move |at, launch| {
            let [seen_stride, _] = call.seen_strides(at.tensors);
            let (counters, counter_count) = at.counters(clears);
            let args = KeyMaskArgs {
                mask: at.tensors.mask,
                keys: problem.kv_len as i32,
                sequences: made.sequences as i32,
                seen: at.of(seen),
                seen_stride: SEEN_WORDS as i32 * seen_stride,
                words: at.of(packed.words),
                q_tiles: made.q_tiles as i32,
                tile_counts: at.of(made.counts),
                tile_lists: at.of(made.lists),
                list_stride: made.list_stride as i32,
                counters,
                counter_count,
            };
            launch(key_mask.grid(made.sequences), &args.args(), &[]);
        });
        made
    }

    /// Reserves the lists of masks that differ so.
    fn reserve(
        call: &ForwardCall,
        config: &AttentionConfig,
        (extent, packed, seen): (Extent, Option<PackedMask>, Slot),
        pass: &mut ForwardPass,
    ) -> Self {
        let (sequences, heads) = extent.numbers(call);
        let q_tiles = config.q_tiles(call.problem.q_len);
        let list_stride = call.problem.kv_len.div_ceil(config.tiling.tile_keys()) + ENTRIES_BEHIND;
        let lists = sequences * heads * q_tiles;
        let counts = pass.slot(slot::TILE_COUNTS, 4 * lists);
        let entries = pass.slot(slot::TILE_LISTS, 4 * lists * list_stride);
        TileLists { counts, lists: entries, list_stride, q_tiles, extent, sequences, heads, packed, seen }
    }

    fn list(&self, call: &ForwardCall, at: &Addresses<'_, Tensors>) -> ListTilesArgs {
        let [seen_stride_sequence, seen_stride_head] = call.seen_strides(at.tensors);
        let mut args = ListTilesArgs {
            seen: at.of(self.seen),
            seen_stride_sequence,
            seen_stride_head,
            group_size: call.problem.group_size() as i32,
            blocks: at.tensors.blocks,
            lengths: call.lengths(at.tensors),
            q_tiles: self.q_tiles as i32,
            heads: self.heads as i32,
            all_heads: (self.sequences * self.heads) as i32,
            tile_counts: at.of(self.counts),
            tile_lists: at.of(self.lists),
            list_stride: self.list_stride as i32,
            ..ListTilesArgs::default()
        };
        if let Some(packed) = &self.packed {
            let row = packed.keys.div_ceil(KEY_TILE);
            let head = packed.rows.div_ceil(CLASS_ROWS) * row;
            args.classes = at.of(packed.classes);
            [args.class_stride_sequence, args.class_stride_head] = packed.extent.strides(packed.heads, head);
            args.class_stride_rows = if packed.extent.rows { row as i32 } else { 0 };
        }
        args
    }

    /// An attention kernel's arguments with what it reads of the lists.
    pub fn args(&self, args: &AttentionArgs, at: &Addresses<'_, Tensors>) -> ListedArgs {
        let [sequence, head] = self.extent.strides(self.heads, self.q_tiles);
        let mut lists = TileListArgs {
            tile_counts: at.of(self.counts),
            tile_lists: at.of(self.lists),
            list_stride: self.list_stride as i32,
            list_stride_sequence: sequence as i32,
            list_stride_head: head as i32,
            ..TileListArgs::default()
        };
        if let Some(packed) = &self.packed {
            let row = packed.row_words();
            lists.mask_words = at.of(packed.words);
            [lists.words_stride_sequence, lists.words_stride_head] =
                packed.extent.strides(packed.heads, packed.rows.div_ceil(CLASS_ROWS) * row);
            lists.words_stride_rows = if packed.extent.rows { row as i64 } else { 0 };
        }
        let mut all = [Arg::I32(0); AttentionArgs::COUNT + TileListArgs::COUNT];
        all[..AttentionArgs::COUNT].copy_from_slice(&args.args());
        all[AttentionArgs::COUNT..].copy_from_slice(&lists.args());
        all
    }
}

impl PackedMask {
    /// Adds the launch that classes the tiles of a mask; none where there is nothing to read element by element.
    fn pack(call: &ForwardCall, config: &AttentionConfig, pass: &mut ForwardPass) -> Option<Self> {
        let (problem, request) = (call.problem, call.request);
        let masked = request.mask != MaskForm::None;
        if !masked && !config.block_edges {
            return None;
        }
        let mut extent = Extent::NONE;
        if masked {
            extent = extent.or(request.mask_extent);
        }
        if config.block_edges {
            extent = extent.or(Extent { rows: true, ..request.blocks_extent });
        }
        // Of fewer keys than the mask has, the last may be part of a chunk.
        let whole = masked && problem.kv_len == request.kv_rows;
        let pack = PackMaskConfig {
            mask: request.mask,
            access: if whole { request.mask_access } else { MaskAccess::Elements },
            blocks: config.block_edges,
            packing: config.packing(),
        };
        let mut packed = PackedMask::reserve(call, config.packing(), extent, pass);
        let PackedMask { rows, keys, heads, .. } = packed;
        let (sequences, _) = extent.numbers(call);
        let all_heads = sequences * heads;
        let classes = all_heads * rows.div_ceil(CLASS_ROWS) * keys.div_ceil(KEY_TILE);
        packed.classes = pass.slot(slot::MASK_CLASSES, classes);
        pass.launch(pack, move |at, launch| {
            let [blocks_q, blocks_k] = problem.blocks.unwrap_or([1; 2]);
            let args = PackMaskArgs {
                mask: at.tensors.mask,
                blocks: at.tensors.blocks,
                blocks_q: blocks_q as i32,
                blocks_k: blocks_k as i32,
                rows: rows as i32,
                keys: problem.kv_len as i32,
                heads: heads as i32,
                all_heads: all_heads as i32,
                classes: at.of(packed.classes),
                words: at.of(packed.words),
            };
            launch(pack.grid(rows, problem.kv_len, all_heads), &args.args(), &[]);
        });
        Some(packed)
    }

    /// Reserves the words of a mask that differs so; it has no classes.
    fn reserve(call: &ForwardCall, packing: Option<Packing>, extent: Extent, pass: &mut ForwardPass) -> Self {
        let (sequences, heads) = extent.numbers(call);
        let rows = if extent.rows { call.problem.q_len } else { 1 };
        let keys = call.problem.kv_len.max(1);
        let none = Slot::NONE;
        let mut packed = PackedMask { classes: none, words: none, packing, extent, heads, rows, keys };
        let words = sequences * heads * rows.div_ceil(CLASS_ROWS) * packed.row_words();
        if words > 0 {
            packed.words = pass.slot(slot::MASK_WORDS, 4 * words);
        }
        packed
    }

    /// Words of a tile of rows.
    fn row_words(&self) -> usize {
        self.keys.div_ceil(KEY_TILE) * self.packing.map_or(0, Packing::tile_words)
    }
}

impl Extent {
    /// Sequences and heads of a call that differ.
    fn numbers(self, call: &ForwardCall) -> (usize, usize) {
        let problem = &call.problem;
        (if self.batches { problem.batch } else { 1 }, if self.heads { problem.num_q_heads } else { 1 })
    }

    /// From one sequence's elements to the next's, and from one head's: `heads` lie side by side, of so many elements.
    fn strides(self, heads: usize, of_head: usize) -> [i64; 2] {
        let of_sequence = if self.batches { heads * of_head } else { 0 };
        [of_sequence as i64, if self.heads { of_head as i64 } else { 0 }]
    }
}
