//! Queries, keys and values that resemble those of a video diffusion transformer: what block-sparse attention is for.
//!
//! Tokens are the cells of a grid of T frames of H × W, in the order that diffusion transformers flatten them: token
//! `n = (t·H + h)·W + w`. With `ε` standard normal numbers, new in every place, head `i` has
//!
//! - `q_n = R_n(√s·c + ε) + a·z_n` and `k_n = R_n(√s·c + ε) + a·z_n + β`, where
//! - `R_n` rotates pairs of neighbouring channels by their position, as 3-D RoPE does: of the D/2 pairs each of `h` and
//!   `w` has a third, rounded down, and `t` the rest (Wan's division of 128 channels: 44, 42, 42). Pair `j` of the `m`
//!   of an axis turns by `10000^(−j/m)` radians a step;
//! - `c` is a vector for each head, the same for all tokens, whose squared length is `√D`, so that with `s` the nearest
//!   tokens have a score of `s`. As `⟨R_n c, R_m c⟩ = Σ_j |c_j|²·cos(θ_j·Δ)`, it makes a head attend to what is near
//!   along the axes on which it is large. There `|c_j|²` falls with the fourth root of the angle θ_j;
//! - `z_n = √2·cos(Ω·x_n + φ)` is a smooth random field over the grid, with `x_n = (t/T, h/H, w/W)`, `D × 3` normal
//!   frequencies Ω of standard deviation 2π·[`CYCLES`] and random phases φ, divided by `D^¼`: tokens of one object
//!   are alike wherever their positions lie, with a score of `a²` in the mean;
//! - `β` is a bias of the channels, the same for all keys: normal, and eight times as large on every sixteenth channel.
//!   It moves no softmax, as all scores of a row move by as much, but is what makes K hard to quantise.
//! - `v_n = z'_n·D^¼ + ε/2`, with a field of its own.
//!
//! | head modulo 4 | attends to | `c` is large on | s | a |
//! | --- | --- | --- | --- | --- |
//! | 0 | its neighbourhood | all three axes | 16 | 0 |
//! | 1 | its frame | t | 12 | 1 |
//! | 2 | its place, in all frames | h, w | 16 | 1 |
//! | 3 | its object | nothing | 0 | 3.4 |
//!
//! In heads 4 to 7 both √s and a are 0.8 times as large, so that their attention is wider, and so on alternately.

use std::f32::consts::{SQRT_2, TAU};
use std::fmt;
use std::str::FromStr;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;
use sageattention::{DType, Error, Geometry, Result, Tensor};
use sageattn_files::qkv_file::Qkv;

/// Waves of the random field that fit the grid along an axis, in the mean.
const CYCLES: f32 = 0.8;

/// A grid of tokens: frames, rows and columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VideoGrid {
    pub frames: usize,
    pub height: usize,
    pub width: usize,
}

impl FromStr for VideoGrid {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let wrong = || "expected FRAMESxHEIGHTxWIDTH such as 9x24x30".to_owned();
        let size = |text: &str| text.trim().parse::<usize>().ok().filter(|&n| n > 0).ok_or_else(wrong);
        let sizes = text.split('x').map(size).collect::<std::result::Result<Vec<_>, _>>()?;
        let [frames, height, width] = sizes[..] else { return Err(wrong()) };
        Ok(VideoGrid { frames, height, width })
    }
}

impl fmt::Display for VideoGrid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{}", self.frames, self.height, self.width)
    }
}

impl VideoGrid {
    fn sizes(&self) -> [usize; 3] {
        [self.frames, self.height, self.width]
    }

    /// Frame, row and column of a token.
    fn position(&self, token: usize) -> [usize; 3] {
        let plane = self.height * self.width;
        [token / plane, token % plane / self.width, token % self.width]
    }

    /// Q, K and V `[1, heads, tokens, head_dim]` of the grid, the same in every run.
    ///
    /// # Errors
    /// When there is no memory for them, or `head_dim` is odd.
    pub fn tensors(&self, heads: usize, head_dim: usize, dtype: DType) -> Result<Qkv> {
        if !head_dim.is_multiple_of(2) {
            return Err(Error::value("head_dim", head_dim, "an even number, as RoPE rotates pairs"));
        }
        let tokens = self.sizes().into_iter().try_fold(1usize, usize::checked_mul);
        let tokens = tokens.ok_or_else(|| Error::value("video", self, "fewer tokens"))?;
        let shape = [1, heads, tokens, head_dim];
        let len = Geometry::contiguous("q", &shape)?.len();
        let [q, k, v] = [(); 3].map(|()| {
            let mut elements = Vec::new();
            elements.try_reserve_exact(len).map(|()| {
                elements.resize(len, 0f32);
                elements
            })
        });
        let (Ok(mut q), Ok(mut k), Ok(mut v)) = (q, k, v) else {
            return Err(Error::unsupported(
                format!("tensors of shape {shape:?}"),
                format!("no memory for {len} numbers each"),
            ));
        };
        if len > 0 {
            let of_head = tokens * head_dim;
            let parts = (q.par_chunks_mut(of_head), k.par_chunks_mut(of_head), v.par_chunks_mut(of_head));
            parts
                .into_par_iter()
                .enumerate()
                .for_each(|(head, (q, k, v))| self.fill(head, head_dim, [q, k, v]));
        }
        let tensor = |elements| Ok::<_, Error>(Tensor::new(elements, &shape)?.to_dtype(dtype));
        Ok(Qkv { prefix: String::new(), q: tensor(q)?, k: tensor(k)?, v: tensor(v)? })
    }

    /// One head of Q, K and V.
    fn fill(&self, index: usize, head_dim: usize, [q, k, v]: [&mut [f32]; 3]) {
        let mut rng = ChaCha8Rng::seed_from_u64(index as u64);
        let head = HeadKind::of(index);
        let rotations = Rotations::new(head_dim);
        let anchor = rotations.anchor(&head, &mut rng);
        let (content, colour) = (Field::new(head_dim, &mut rng), Field::new(head_dim, &mut rng));
        let bias: Vec<f32> = (0..head_dim)
            .map(|channel| normal(&mut rng) * if channel % 16 == 5 { 8.0 } else { 1.0 })
            .collect();
        let unit = (head_dim as f32).powf(0.25);
        let rows = q.chunks_exact_mut(head_dim).zip(k.chunks_exact_mut(head_dim));
        for (token, ((q, k), v)) in rows.zip(v.chunks_exact_mut(head_dim)).enumerate() {
            let position = self.position(token);
            let place = [0, 1, 2].map(|axis| position[axis] as f32 / self.sizes()[axis] as f32);
            for row in [&mut *q, &mut *k] {
                row.iter_mut().zip(&anchor).for_each(|(x, c)| *x = c + normal(&mut rng));
                rotations.rotate(row, position);
            }
            for channel in 0..head_dim {
                let z = head.content * content.at(channel, place) / unit;
                q[channel] += z;
                k[channel] += z + bias[channel];
                v[channel] = colour.at(channel, place) + 0.5 * normal(&mut rng);
            }
        }
    }
}

fn normal(rng: &mut ChaCha8Rng) -> f32 {
    StandardNormal.sample(rng)
}

/// What a head attends to.
struct HeadKind {
    /// Scores of near tokens, s.
    near: f32,
    /// Weight of each axis: t, h, w.
    axes: [f32; 3],
    /// Weight of the content, a.
    content: f32,
}

impl HeadKind {
    fn of(index: usize) -> Self {
        let (near, axes, content) = match index % 4 {
            0 => (16.0, [1.0; 3], 0.0),
            1 => (12.0, [1.0, 0.0, 0.0], 1.0),
            2 => (16.0, [0.0, 1.0, 1.0], 1.0),
            _ => (0.0, [0.0; 3], 3.4),
        };
        let strength = if (index / 4).is_multiple_of(2) { 1.0 } else { 0.8 };
        HeadKind { near: near * strength * strength, axes, content: content * strength }
    }
}

/// 3-D RoPE of a grid: the axis of each pair of channels, and its angle a step.
struct Rotations(Vec<(usize, f32)>);

impl Rotations {
    fn new(head_dim: usize) -> Self {
        let pairs = head_dim / 2;
        let third = pairs / 3;
        let of_axis = |(axis, count): (usize, usize)| {
            (0..count).map(move |j| (axis, 10_000f32.powf(-(j as f32) / count as f32)))
        };
        Rotations([pairs - 2 * third, third, third].into_iter().enumerate().flat_map(of_axis).collect())
    }

    /// The vector c of a head, times √s: of random directions in the pairs of its axes.
    fn anchor(&self, head: &HeadKind, rng: &mut ChaCha8Rng) -> Vec<f32> {
        let weight = |&(axis, angle): &(usize, f32)| head.axes[axis] * angle.powf(0.25);
        let total: f32 = self.0.iter().map(weight).sum();
        let head_dim = 2.0 * self.0.len() as f32;
        let pair = |pair: &(usize, f32)| {
            let share = if total > 0.0 { weight(pair) / total } else { 0.0 };
            let length = (head.near * head_dim.sqrt() * share).sqrt();
            let (sin, cos) = (TAU * rng.random::<f32>()).sin_cos();
            [length * cos, length * sin]
        };
        self.0.iter().flat_map(pair).collect()
    }

    /// Rotates a row to its position.
    fn rotate(&self, row: &mut [f32], position: [usize; 3]) {
        let (pairs, _) = row.as_chunks_mut::<2>();
        for (pair, &(axis, angle)) in pairs.iter_mut().zip(&self.0) {
            let (sin, cos) = (position[axis] as f32 * angle).sin_cos();
            *pair = [pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos];
        }
    }
}

/// A smooth random number for each channel, of variance 1: nearby places have nearly the same.
struct Field(Vec<([f32; 3], f32)>);

impl Field {
    fn new(channels: usize, rng: &mut ChaCha8Rng) -> Self {
        let wave = |_| ([(); 3].map(|()| TAU * CYCLES * normal(rng)), TAU * rng.random::<f32>());
        Field((0..channels).map(wave).collect())
    }

    fn at(&self, channel: usize, place: [f32; 3]) -> f32 {
        let (frequency, phase) = self.0[channel];
        let angle = frequency.iter().zip(place).map(|(f, x)| f * x).sum::<f32>() + phase;
        SQRT_2 * angle.cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mean score of pairs of tokens of a head whose positions differ by `step`.
    fn mean_score(qkv: &Qkv, grid: &VideoGrid, head: usize, step: [usize; 3]) -> f32 {
        let d = qkv.q.shape()[3];
        let [frames, height, width] = grid.sizes();
        let at = |[t, h, w]: [usize; 3]| (t * height + h) * width + w;
        let (mut sum, mut count) = (0.0, 0.0);
        for t in 0..frames - step[0] {
            for h in 0..height - step[1] {
                for w in 0..width - step[2] {
                    let (i, j) = (at([t, h, w]), at([t + step[0], h + step[1], w + step[2]]));
                    let k = |c| qkv.k.view().at([0, head, j, c]) - mean(qkv, head, c);
                    let dot: f32 = (0..d).map(|c| qkv.q.view().at([0, head, i, c]) * k(c)).sum();
                    sum += dot / (d as f32).sqrt();
                    count += 1.0;
                }
            }
        }
        sum / count
    }

    /// Mean of a channel of K.
    fn mean(qkv: &Qkv, head: usize, channel: usize) -> f32 {
        let tokens = qkv.k.shape()[2];
        (0..tokens).map(|j| qkv.k.view().at([0, head, j, channel])).sum::<f32>() / tokens as f32
    }

    #[test]
    fn heads_attend_along_the_axes_of_their_kind() {
        let grid = VideoGrid { frames: 6, height: 7, width: 8 };
        let qkv = grid.tensors(4, 24, DType::F32).unwrap();
        let score = |head, step| mean_score(&qkv, &grid, head, step);
        let far = [[4, 0, 0], [0, 4, 0], [0, 0, 4]];
        let fall = |head: usize| far.map(|step| score(head, [0; 3]) - score(head, step));
        let [t, h, w] = fall(0);
        assert!(t > 1.0 && h > 1.0 && w > 1.0, "its neighbourhood: {t} {h} {w}");
        let [t, h, w] = fall(1);
        assert!(t > 1.0 && t > h + 0.5 && t > w + 0.5, "its frame: {t} {h} {w}");
        let [t, h, w] = fall(2);
        assert!(h > t + 0.5 && w > t + 0.5, "its place: {t} {h} {w}");
    }

    #[test]
    fn the_first_token_of_a_row_follows_the_last_of_the_row_before() {
        let grid = VideoGrid { frames: 2, height: 3, width: 5 };
        assert_eq!(grid.position(14), [0, 2, 4]);
        assert_eq!(grid.position(15), [1, 0, 0]);
        assert_eq!("2x3x5".parse(), Ok(grid));
        assert_eq!(grid.to_string(), "2x3x5");
        for wrong in ["2x3", "2x3x0", "2x3x5x1", "axbxc"] {
            assert!(wrong.parse::<VideoGrid>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_odd_head_dim_has_no_pairs() {
        let grid = VideoGrid { frames: 1, height: 1, width: 1 };
        let message = grid.tensors(1, 7, DType::F32).unwrap_err().to_string();
        assert_eq!(message, "head_dim: value is 7, expected an even number, as RoPE rotates pairs");
    }

    #[test]
    fn keys_have_channels_far_from_zero() {
        let grid = VideoGrid { frames: 4, height: 4, width: 4 };
        let qkv = grid.tensors(1, 32, DType::F32).unwrap();
        let means: Vec<f32> = (0..32).map(|channel| mean(&qkv, 0, channel).abs()).collect();
        assert!(means.iter().any(|&mean| mean > 3.0), "{means:?}");
    }
}
