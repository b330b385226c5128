//! Where models are computed.

use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Device};

use crate::Result;

/// A processor, as `--device` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// This process's memory.
    Cpu,
    /// A GPU, by its number.
    Cuda(usize),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let gpu = |number: &str| number.parse().ok().map(Place::Cuda);
        let place = match name.split_once(':') {
            None if name == "cpu" => Some(Place::Cpu),
            None if name == "cuda" => Some(Place::Cuda(0)),
            Some(("cuda", number)) => gpu(number),
            _ => None,
        };
        place.ok_or_else(|| format!("device is {name:?}, expected cpu, cuda or cuda:NUMBER"))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Cpu => f.write_str("cpu"),
            Place::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

impl Place {
    /// Candle's name for it.
    ///
    /// # Errors
    /// Where there is no such GPU, or this build has no CUDA.
    pub fn open(self) -> Result<Device> {
        match self {
            Place::Cpu => Ok(Device::Cpu),
            Place::Cuda(_) if !cfg!(feature = "cuda") => {
                Err(format!("--device {self}: this build has no CUDA; build with --features cuda").into())
            }
            Place::Cuda(number) => Device::new_cuda(number).map_err(|error| {
                // Where RUST_BACKTRACE is set, candle adds a backtrace.
                let reason = error.to_string();
                format!("--device {self}: {}", reason.lines().next().unwrap_or_default()).into()
            }),
        }
    }

    /// What models are computed in there: GPUs have matrix units for 16 bits, and attention there takes no other.
    pub fn dtype(self) -> DType {
        match self {
            Place::Cpu => DType::F32,
            Place::Cuda(_) => DType::BF16,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_the_names_that_they_print() {
        for (name, place) in [("cpu", Place::Cpu), ("cuda:0", Place::Cuda(0)), ("cuda:3", Place::Cuda(3))] {
            assert_eq!((name.parse(), place.to_string().as_str()), (Ok(place), name));
        }
        assert_eq!("cuda".parse(), Ok(Place::Cuda(0)));
        for wrong in ["gpu", "cuda:", "cuda:-1", "cpu:0"] {
            let message = format!("device is {wrong:?}, expected cpu, cuda or cuda:NUMBER");
            assert_eq!(wrong.parse::<Place>(), Err(message));
        }
    }

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn a_build_without_cuda_says_so() {
        let message = Place::Cuda(1).open().unwrap_err().to_string();
        assert_eq!(message, "--device cuda:1: this build has no CUDA; build with --features cuda");
    }
}
