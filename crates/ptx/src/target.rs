//! GPU architectures and PTX versions, and what an instruction needs of them.

use std::fmt;
use std::str::FromStr;

/// A GPU architecture as PTX names it: `sm_80`, or `sm_90a` with the instructions of that chip alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    sm: u16,
    specific: bool,
}

impl Target {
    /// Turing.
    pub const SM_75: Target = Target::baseline(75);
    /// Ampere: A100.
    pub const SM_80: Target = Target::baseline(80);
    /// Ampere: RTX 30, A40.
    pub const SM_86: Target = Target::baseline(86);
    /// Ampere: Orin.
    pub const SM_87: Target = Target::baseline(87);
    /// Ada: RTX 40, L4, L40.
    pub const SM_89: Target = Target::baseline(89);
    /// Hopper, without its own instructions.
    pub const SM_90: Target = Target::baseline(90);
    /// Hopper: H100, H200, with `wgmma` and `setmaxnreg`.
    pub const SM_90A: Target = Target::specific(90);
    /// Blackwell, data centre.
    pub const SM_100: Target = Target::baseline(100);
    /// Blackwell, data centre, with its own instructions.
    pub const SM_100A: Target = Target::specific(100);
    /// Blackwell: RTX 50.
    pub const SM_120: Target = Target::baseline(120);
    /// Blackwell: RTX 50, with block-scaled FP4.
    pub const SM_120A: Target = Target::specific(120);
    /// Blackwell: DGX Spark, with block-scaled FP4.
    pub const SM_121A: Target = Target::specific(121);

    /// The targets that kernels are tuned and assembled for.
    pub const ALL: [Target; 9] = [
        Target::SM_75,
        Target::SM_80,
        Target::SM_86,
        Target::SM_89,
        Target::SM_90,
        Target::SM_90A,
        Target::SM_100,
        Target::SM_120,
        Target::SM_120A,
    ];

    const fn baseline(sm: u16) -> Target {
        Target { sm, specific: false }
    }

    const fn specific(sm: u16) -> Target {
        Target { sm, specific: true }
    }

    /// The richest target of a GPU of compute capability `major.minor`.
    pub const fn of_capability(major: u16, minor: u16) -> Target {
        Target { sm: major * 10 + minor, specific: major >= 9 }
    }

    /// Compute capability times ten: 89 for `sm_89`.
    pub const fn sm(self) -> u16 {
        self.sm
    }

    /// Whether the target has the instructions of that chip alone (`sm_90a`).
    pub const fn is_specific(self) -> bool {
        self.specific
    }

    /// Whether code for `self` can be compiled for, and run on, a GPU whose richest target is `gpu`.
    pub const fn runs_on(self, gpu: Target) -> bool {
        if self.specific { gpu.specific && gpu.sm == self.sm } else { gpu.sm >= self.sm }
    }

    /// Lowest PTX version whose assembler knows the target.
    pub const fn version(self) -> Version {
        let (major, minor) = match (self.sm, self.specific) {
            (0..=75, _) => (6, 3),
            (76..=80, _) => (7, 0),
            (81..=86, _) => (7, 1),
            (87, _) => (7, 4),
            (88..=90, false) => (7, 8),
            (88..=90, true) => (8, 0),
            (91..=101, _) => (8, 6),
            (102..=120, _) => (8, 7),
            _ => (8, 8),
        };
        Version { major, minor }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sm_{}{}", self.sm, if self.specific { "a" } else { "" })
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Target, String> {
        let wrong =
            || format!("target: value is `{text}`, expected sm_75 to sm_121, such as sm_89 or sm_90a");
        let digits = text.strip_prefix("sm_").ok_or_else(wrong)?;
        let (digits, specific) = match digits.strip_suffix('a') {
            Some(digits) => (digits, true),
            None => (digits, false),
        };
        match digits.parse() {
            Ok(sm @ (75 | 80 | 86 | 87 | 89 | 90 | 100 | 103 | 110 | 120 | 121)) if !specific || sm >= 90 => {
                Ok(Target { sm, specific })
            }
            _ => Err(wrong()),
        }
    }
}

/// A version of the PTX language, which decides how old a driver can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// 8 of 8.4.
    pub major: u8,
    /// 4 of 8.4.
    pub minor: u8,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// What an instruction needs: the oldest target, or one chip alone, and the PTX version that introduced it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Oldest target; where it is [specific](Target::is_specific), that chip's generation alone.
    pub target: Target,
    /// Lowest PTX version.
    pub version: Version,
}

impl Needs {
    /// What every target and every driver in use has.
    pub const BASE: Needs = Needs::since(Target::SM_75, 6, 3);

    /// What every target from `target` on has.
    pub const fn since(target: Target, major: u8, minor: u8) -> Needs {
        Needs { target, version: Version { major, minor } }
    }

    /// Whether `target` has the instruction.
    pub const fn met_by(self, target: Target) -> bool {
        if self.target.specific {
            // sm_120a and sm_121a share the instructions of their family.
            target.specific && target.sm / 10 == self.target.sm / 10 && target.sm >= self.target.sm
        } else {
            target.sm >= self.target.sm
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for target in Target::ALL {
            assert_eq!(target.to_string().parse(), Ok(target));
        }
        for wrong in ["sm_", "sm_85", "sm_89a", "90", "sm_90aa", "sm_-1"] {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn specific_code_runs_on_its_chip_alone() {
        assert!(Target::SM_80.runs_on(Target::SM_90A));
        assert!(Target::SM_90A.runs_on(Target::of_capability(9, 0)));
        assert!(!Target::SM_90A.runs_on(Target::of_capability(10, 0)));
        assert!(!Target::SM_89.runs_on(Target::of_capability(8, 6)));
        assert!(Needs::since(Target::SM_120A, 8, 7).met_by(Target::SM_121A));
        assert!(!Needs::since(Target::SM_90A, 8, 0).met_by(Target::SM_100A));
    }
}
