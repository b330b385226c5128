use sage_core::*; use sage_kernels::attention::*; use sage_kernels::*; use sage_ptx::Target;
fn main(){
  let a: Vec<String> = std::env::args().collect();
  let target: Target = a[1].parse().unwrap();
  let Qk::Int(q) = Preset::SAGE2_INT8_FP8_PER_THREAD.scheme(128).qk else {panic!()};
  let q = IntQuantizer{ rounding: Rounding::NearestEven, zero_group: ZeroGroup::Guard, tile: Tile{block_q:128,warp_q:32,block_k:64,warp_k:64}, ..q};
  let base = AttentionConfig{ dtype: DType::F16, head_dim: a[2].parse().unwrap(), scores: Scores::Int(q), values: Values::F16(Accumulator::F32), value_source: ValueSource::Given, mask: MaskForm::None, softcap:false, lse:false, smooth_k:true, smooth_q:None, smooth_v:false, lengths: sage_kernels::Lengths::Dense, aligned:true, split:false, tiling: Tiling{warps:4, rows_per_warp:32, stages:2, min_blocks:2, lazy_rescale:8}};
  let c = match a[3].as_str() { "int8_f16" => base, "full" => AttentionConfig{scores: Scores::Full, ..base}, "fp8" => AttentionConfig{values: Values::Fp8(Accumulator::F32ThenF32), value_source: ValueSource::Workspace, ..base},
   "fp8h" => AttentionConfig{values: Values::Fp8(Accumulator::F16ThenF32), value_source: ValueSource::Workspace, ..base},
   "all" => AttentionConfig{softcap:true, lse:true, mask: MaskForm::Bias(DType::F32), smooth_q:Some(128), aligned:false, lengths: sage_kernels::Lengths::Packed, ..base}, _=>panic!()};
  print!("{}", attention(&c).ptx(target).unwrap());
}
