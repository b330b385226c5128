//! V's quantiser in the emulator.

use sage_core::ScaleRows;
use sage_emulator::Emulator;
use sage_kernels::Kernel;
use sage_kernels::preprocess::{
    ColumnStatistics, InputArgs, QuantizeVArgs, QuantizeVConfig, SampleArgs, SampleConfig, ValueScales,
};

use crate::inputs::{Tensor, folded, launch, poisoned};

/// How V is quantised.
#[derive(Clone, Copy, Debug)]
pub struct ValuePasses {
    pub smooth: bool,
    pub v_max: f32,
    pub scale_rows: ScaleRows,
    /// Heads that statistics run ahead.
    pub lead: usize,
    /// Whether grids are those of very many heads.
    pub folded: bool,
}

/// What the passes write.
pub struct QuantizedValues {
    /// Tiles of codes.
    pub out: Vec<u8>,
    /// `[sequences][heads][padded_dim]`; of no meaning where V is not smoothed.
    pub mean: Vec<f32>,
    /// `[sequences][heads][padded_dim]`.
    pub scale: Vec<f32>,
}

impl ValuePasses {
    /// The kernels that read V whole.
    pub fn configs(&self, tensor: &Tensor) -> Vec<QuantizeVConfig> {
        let config = |scales| QuantizeVConfig { source: tensor.source, smooth: self.smooth, scales };
        match self.scale_rows {
            ScaleRows::All => vec![config(ValueScales::Collected)],
            ScaleRows::Sampled(_) => {
                [ValueScales::Given, ValueScales::CollectedWhereMarked].map(config).to_vec()
            }
        }
    }

    /// Runs them on a tensor that lies at `input`.
    #[track_caller]
    pub fn run(&self, emulator: &mut Emulator, tensor: &Tensor, input: InputArgs) -> QuantizedValues {
        let configs = self.configs(tensor);
        let (heads, tiles, width) = (tensor.heads, tensor.batch.tiles(), tensor.source.padded_dim());
        let sequences = tensor.batch.sequences().len();
        let out = poisoned(emulator, "out", heads * tiles * configs[0].tile_bytes());
        let [mean, scale, factor] =
            ["mean", "scale", "factor"].map(|name| emulator.uninitialized(name, tensor.statistics() * 4));
        let arrivals = emulator.buffer("arrivals", &vec![0u32; sequences * heads]);
        let marked = emulator.uninitialized("marked", sequences * heads * 4);
        let parts = configs[0].statistics().partials();
        let partials = emulator.uninitialized("partials", heads * tiles * width * parts * 4);
        let fold = |grid| if self.folded { folded(grid) } else { grid };
        if let ScaleRows::Sampled(rows) = self.scale_rows {
            let sample = SampleConfig { source: tensor.source, rows, statistics: ColumnStatistics::Scale };
            let args = SampleArgs {
                input,
                mean: 0,
                scale: scale.address(),
                factor: factor.address(),
                v_max: self.v_max,
                counters: marked.address(),
                counter_count: (sequences * heads) as i32,
            };
            launch(emulator, &sample.program(), folded(sample.grid(heads, sequences)), &args.args());
        }
        let args = QuantizeVArgs {
            input,
            out: out.address(),
            mean: mean.address(),
            scale: scale.address(),
            factor: factor.address(),
            partials: partials.address(),
            arrivals: arrivals.address(),
            marked: marked.address(),
            key_tiles: tiles as i32,
            v_max: self.v_max,
            lead: self.lead as i32,
        };
        for config in configs {
            let grid = fold(config.grid(tensor.batch.max_len(), heads, sequences, self.lead));
            launch(emulator, &config.program(), grid, &args.args());
        }
        assert_eq!(emulator.written_bytes(scale), scale.len());
        QuantizedValues { out: emulator.read(out), mean: emulator.read(mean), scale: emulator.read(scale) }
    }
}
