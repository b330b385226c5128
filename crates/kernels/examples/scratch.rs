//! scratch
use sage_core::*;
use sage_kernels::attention::*;
use sage_kernels::forward::*;
use sage_ptx::Target;
fn main() {
    let a: Vec<String> = std::env::args().skip(1).collect();
    // scheme head_dim warps keys qreg stages turns causal
    let head_dim: usize = a[1].parse().unwrap();
    let scheme = match a[0].as_str() {
        "int8" => int8_scheme(DType::F16),
        name => name.parse::<Preset>().unwrap().scheme(head_dim),
    };
    let shape = [1usize, 2, 4096, head_dim];
    let n: usize = shape.iter().product();
    let x = Tensor::new(vec![half::f16::ZERO; n], &shape).unwrap();
    let inputs: Inputs<TensorView, Mask> = Inputs::dense(x.view(), x.view(), x.view());
    let options = Options::default();
    let call = Call::check(&inputs, &options).unwrap();
    let tiling = (a.len() > 2).then(|| Tiling {
        engine: Engine::Warpgroups,
        warps: a[2].parse().unwrap(),
        rows_per_warp: 16,
        tile_keys: a[3].parse().unwrap(),
        step_keys: a[3].parse().unwrap(),
        queries_in_registers: a[4] == "1",
        stages: a[5].parse().unwrap(),
        min_blocks: 1,
        turns: a[6] == "1",
        lazy_rescale: if a[0] == "int8" || a[0] == "full" { 8 } else { 4 },
    });
    let request = Request {
        scheme: Some(scheme),
        mask: MaskForm::None,
        lengths: sage_kernels::Lengths::Dense,
        q_rows: 4096,
        kv_rows: 4096,
        aligned: true,
        boxed: true,
        lse: false,
        tiling,
    };
    let f =
        Forward::new(&call.problem, &request, &Gpu { target: Target::SM_90A, multiprocessors: 132 }).unwrap();
    for p in f.programs() {
        if p.name.starts_with("attention") {
            eprintln!("{}", p.name);
            println!("{}", p.ptx(Target::SM_90A).unwrap());
        }
    }
}
