//! `sageattn warm`: what it compiles, where that is kept, and what it refuses. With a fake driver in place of a GPU's.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // the helpers of tests are tests too

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

#[path = "../../cuda/tests/fake_driver/build.rs"]
mod build;

/// A machine with a fake driver, and folders of its own.
struct Machine {
    folder: TempDir,
}

impl Machine {
    fn new() -> Option<Machine> {
        let folder = tempfile::tempdir().unwrap();
        build::build(folder.path(), &["named", "whole", "clusters", "any_kernel"])?;
        Some(Machine { folder })
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("cache")
    }

    /// Exit code, standard output and standard error of the command, with these variables.
    fn run(&self, words: &str, variables: &[(&str, &str)]) -> (Option<i32>, String, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sageattn"));
        command.args(words.split_whitespace()).env("LD_LIBRARY_PATH", self.folder.path());
        for name in ["CUDA_CACHE_PATH", "CUDA_CACHE_DISABLE", "CUDA_CACHE_MAXSIZE", "FAKE_CUDA"] {
            command.env_remove(name);
        }
        command.env("SAGEATTENTION_CACHE_DIR", self.cache()).env("HOME", self.folder.path());
        let output = command.envs(variables.iter().copied()).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    }

    fn json(&self, words: &str, variables: &[(&str, &str)]) -> (Value, String) {
        let (code, out, err) = self.run(&format!("{words} --json"), variables);
        assert_eq!(code, Some(0), "{words}: {err}");
        (serde_json::from_str(&out).unwrap(), err)
    }
}

/// Names and origins.
fn kernels(report: &Value) -> Vec<(&str, &str)> {
    let kernels = report["kernels"].as_array().unwrap().iter();
    kernels.map(|kernel| (kernel["name"].as_str().unwrap(), kernel["from"].as_str().unwrap())).collect()
}

#[test]
fn kernels_are_compiled_once_and_found_by_later_processes() {
    let Some(machine) = Machine::new() else { return };
    let words = "warm 2,8,300,64 1,8/2,7x500,128 --causal --lse";
    let (first, err) = machine.json(words, &[]);
    assert_eq!((err.as_str(), first["device"].as_str()), ("", Some("cuda:0")));
    let first = kernels(&first);
    let made_by = |who| first.iter().filter(|(_, from)| *from == who).count();
    assert!(made_by("driver") > 0 && made_by("compiled") > 0, "{first:?}");
    assert_eq!(made_by("driver") + made_by("compiled"), first.len(), "{first:?}");
    let (second, _) = machine.json(words, &[]);
    let from_disk = |(name, from)| (name, if from == "compiled" { "disk" } else { from });
    assert_eq!(kernels(&second), first.iter().copied().map(from_disk).collect::<Vec<_>>());
    assert_eq!(second["disk_cache"].as_str().map(PathBuf::from), Some(machine.cache()));
    let home = machine.folder.path().join(".nv/ComputeCache");
    assert_eq!(second["driver_cache"].as_str().map(PathBuf::from), Some(home));

    let (_, text, _) = machine.run(words, &[]);
    assert!(first.iter().all(|(name, _)| text.contains(name)), "{text}");
    assert!(
        text.contains(&format!("{} kernels in ", first.len())) && text.contains("are kept in "),
        "{text}"
    );
}

#[test]
fn options_choose_the_kernels() {
    let Some(machine) = Machine::new() else { return };
    let names = |words: &str| {
        let (report, err) = machine.json(&format!("warm {words}"), &[]);
        assert_eq!(err, "", "{words}");
        kernels(&report).iter().map(|(name, _)| (*name).to_owned()).collect::<Vec<_>>()
    };
    let plain = names("1,8,2048,128");
    for (words, part) in [
        ("1,8,2048,128 --dtype bf16", "_bf16_"),
        ("1,8,2048,128 --scheme int8-fp8", "_fp8_"),
        ("1,8,2048,128 --mask bool", "_mask"),
        ("1,8,2048,64 --mask f16", "_bias_f16"),
        ("2,8,2048,128 --kv-lens 2048,7", "_kvlens"),
        ("1,8,2048,128 --predictor sla --topk 0.25", "choose_blocks"),
        ("2,8/2,1x500,128 --kv-cache int8 --causal", "cache_append"),
    ] {
        let names = names(words);
        assert_ne!(names, plain, "{words}");
        assert!(names.iter().any(|name| name.contains(part)), "{words}: {names:?}");
    }
    assert_eq!(names("1,8,2048,128 --layout nhd"), plain, "kernels take any strides");
}

/// Where the driver cannot write, its kernels are remembered beside our own all the same.
#[test]
fn a_driver_that_can_write_nowhere_is_given_a_folder() {
    let Some(machine) = Machine::new() else { return };
    // A place where nobody can write, root neither.
    let read_only = ("HOME", "/proc");
    let (report, err) = machine.json("warm 1,8,2048,128", &[read_only]);
    assert_eq!(err, "");
    let given = machine.cache().join("driver");
    assert_eq!(report["driver_cache"].as_str().map(PathBuf::from), Some(given));
    for (variable, reason) in [
        (("CUDA_CACHE_DISABLE", "1"), "CUDA_CACHE_DISABLE is 1"),
        (("CUDA_CACHE_PATH", "/proc/chosen"), "CUDA_CACHE_PATH is /proc/chosen: "),
        (("SAGEATTENTION_CACHE_DIR", ""), "/proc/.nv/ComputeCache: "),
        (("CUDA_CACHE_MAXSIZE", "1000"), "CUDA_CACHE_MAXSIZE is 1000, expected at least 16777216"),
    ] {
        let (report, err) = machine.json("warm 1,8,2048,128", &[read_only, variable]);
        assert_eq!(report["driver_cache"], Value::Null, "{reason}");
        let warnings = err.matches("the driver's cache: ").count();
        assert!(
            warnings == 1 && err.contains(reason) && err.contains("compiled anew in every process"),
            "{err}"
        );
    }
}

#[test]
fn what_cannot_be_warmed_up_is_said() {
    let Some(machine) = Machine::new() else { return };
    for (words, variables, code, error) in [
        ("warm", &[][..], 2, "the following required arguments were not provided: <SHAPE>... (see --help)"),
        (
            "warm 1,8,64",
            &[],
            2,
            "invalid value '1,8,64' for '<SHAPE>...': expected batch,heads,seq,head_dim such as 1,8,1024,64 or \
             1,32/8,1x4096,192/128 (see --help)",
        ),
        (
            "warm 1,8,64,64 --device cpu",
            &[],
            1,
            "device: value is cpu, expected cuda:N, as a processor has nothing to compile",
        ),
        (
            "warm 1,8,64,64 1,8/3,64,64",
            &[],
            1,
            "shape 1,8/3,64,64: k: shape is [1, 3, 64, 64], expected a number of heads that divides q's 8",
        ),
        (
            "warm 2,8,64,64 --kv-lens 3",
            &[],
            1,
            "shape 2,8,64,64: kv_lens: shape is [1], expected [2], one for each batch entry",
        ),
        (
            "warm 1,8,64,64 --device cuda:7",
            &[],
            1,
            "CUDA device: ordinal is 7, expected 0 to 1, as there are 2 GPUs",
        ),
        (
            "warm 1,8,64,64",
            &[("FAKE_CUDA", "no_gpu")],
            1,
            "CUDA device: ordinal is 0, expected a GPU, but the driver finds none",
        ),
    ] {
        let (found, out, err) = machine.run(words, variables);
        assert_eq!(
            (found, out.as_str(), err.trim_end()),
            (Some(code), "", &*format!("error: {error}")),
            "{words}"
        );
    }
}

#[test]
fn without_a_driver_there_is_nothing_to_warm_up() {
    let nowhere = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_sageattn"));
    let output =
        command.args(["warm", "1,8,64,64", "--device", "cuda:99"]).env("HOME", nowhere.path()).output();
    let output = output.unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.starts_with("error: CUDA "), "{err}");
}
