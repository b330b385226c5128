//! Means of query blocks, and their products with K.

use sage_core::DType;
use sage_core::oracle::{block_means, mean, subtract};
use sage_kernels::preprocess::{DeltaSArgs, DeltaSConfig, InputArgs, QueryMeansArgs, QueryMeansConfig};
use sage_kernels::{KEY_TILE, Kernel};

use crate::inputs::{Batch, Fill, Tensor, assert_mean, emulator, folded, launch};

/// Checks the kernels of GPUs with much shared memory, and of those with little where they differ.
#[track_caller]
fn check(q: &Tensor, k: &Tensor, block: usize, smooth_k: bool) {
    let all = |kib: usize| DeltaSConfig::new(k.source, smooth_k, kib << 10);
    check_by(all(227), q, k, block);
    if all(64) != all(227) {
        assert_eq!(k.source.padded_dim(), 256);
        check_by(all(64), q, k, block);
    }
}

/// Runs both kernels and compares them with double precision.
#[track_caller]
fn check_by(config: DeltaSConfig, q: &Tensor, k: &Tensor, block: usize) {
    let smooth_k = config.smooth_k;
    let width = q.source.padded_dim();
    let (queries, keys) = (q.batch.sequences(), k.batch.sequences());
    let mut emulator = emulator(block as u64);
    let means_config = QueryMeansConfig { source: q.source, block };
    let grid = means_config.grid(q.batch.max_len(), q.heads, queries.len());
    let q_blocks = grid[0] as usize;
    let means = emulator.uninitialized("q_mean", queries.len() * q.heads * q_blocks * width * 4);
    let of_q = q.input(&mut emulator);
    let args = QueryMeansArgs { input: of_q, mean: means.address() };
    launch(&emulator, &means_config.program(), grid, &args.args());
    let written: Vec<f32> = emulator.read(means);

    let mut k_means = vec![0f32; k.statistics()];
    for (s, sequence) in keys.iter().enumerate() {
        for head in 0..k.heads {
            let at = (s * k.heads + head) * width;
            let mean = mean(&k.matrix(sequence, head));
            k_means[at..at + mean.len()].copy_from_slice(&mean);
        }
    }
    let grid = config.grid(k.batch.max_len(), k.heads, keys.len());
    let row_len = grid[0] as usize * KEY_TILE;
    let delta_s = emulator.uninitialized("delta_s", queries.len() * q.heads * q_blocks * row_len * 4);
    let group_size = q.heads / k.heads;
    let of_k = k.input(&mut emulator);
    let args = DeltaSArgs {
        input: InputArgs { q_rows: of_q.rows, cu_seqlens_q: of_q.cu_seqlens, ..of_k },
        k_mean: emulator.buffer("k_mean", &k_means).address(),
        q_mean: means.address(),
        delta_s: delta_s.address(),
        group_size: group_size as i32,
        q_blocks: q_blocks as i32,
        block_rows: block as i32,
    };
    launch(&emulator, &config.program(), folded(grid), &args.args());
    let delta_s: Vec<f32> = emulator.read(delta_s);

    for (s, (of_q, of_k)) in queries.iter().zip(&keys).enumerate() {
        for head in 0..q.heads {
            let (q, keys) = (q.matrix(of_q, head), k.matrix(of_k, head / group_size));
            let expected = block_means(&q, block);
            let k_mean = &k_means[(s * k.heads + head / group_size) * width..][..keys.width()];
            let smoothed = if smooth_k { subtract(&keys, k_mean) } else { keys };
            for b in 0..expected.rows() {
                let row = (s * (k.heads * group_size) + head) * q_blocks + b;
                let mean = &written[row * width..(row + 1) * width];
                let end = q.rows().min((b + 1) * block);
                (0..q.width()).for_each(|c| assert_mean(mean[c], q.column(c).take(end).skip(b * block)));
                assert!(mean[q.width()..].iter().all(|&x| x == 0.0));
                for j in 0..of_k.len.next_multiple_of(KEY_TILE) {
                    let sum = delta_s[row * row_len + j];
                    if j >= of_k.len {
                        assert_eq!(sum, 0.0, "key {j} is beyond the sequence's end");
                        continue;
                    }
                    let products =
                        smoothed.row(j).iter().zip(mean).map(|(&x, &y)| f64::from(x) * f64::from(y));
                    let (exact, magnitude) =
                        products.fold((0.0, 0.0), |(sum, magnitude), p| (sum + p, magnitude + p.abs()));
                    // One rounding of the running sum for each channel.
                    let bound = magnitude * smoothed.width() as f64 * f64::exp2(-24.0);
                    let error = (f64::from(sum) - exact).abs();
                    assert!(error <= bound, "{}: key {j} has {sum}, expected {exact}", config.name());
                }
            }
        }
    }
}

#[test]
fn dense_sequences() {
    for (q_len, kv_len, head_dim, block, aligned) in [
        (130, 65, 128, 128, true),
        (1, 64, 64, 64, true),
        (200, 130, 80, 64, true),
        (65, 70, 256, 64, true),
        (70, 3, 5, 128, false),
    ] {
        for (dtype, smooth_k) in [(DType::F16, true), (DType::BF16, false)] {
            let q =
                Tensor::new(dtype, head_dim, aligned, Batch::Dense { batch: 2, len: q_len }, 4, Fill::Bias);
            let k = Tensor::new(
                dtype,
                head_dim,
                aligned,
                Batch::Dense { batch: 2, len: kv_len },
                2,
                Fill::Normal,
            );
            check(&q, &k, block, smooth_k);
        }
    }
}

#[test]
fn more_query_blocks_than_are_multiplied_at_once() {
    for head_dim in [64, 128, 256] {
        let q = Tensor::new(DType::F16, head_dim, true, Batch::one(64 * 7 + 1), 6, Fill::Normal);
        let k = Tensor::new(DType::F16, head_dim, true, Batch::one(65), 2, Fill::Bias);
        check(&q, &k, 64, true);
    }
}

#[test]
fn packed_sequences() {
    let q = Tensor::new(DType::F16, 64, true, Batch::Packed(vec![130, 0, 5, 64]), 2, Fill::Normal);
    let k = Tensor::new(DType::F16, 64, true, Batch::Packed(vec![3, 64, 0, 130]), 1, Fill::Normal);
    check(&q, &k, 64, true);
}
