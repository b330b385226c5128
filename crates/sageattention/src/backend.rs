//! The backends of this build, each looked for once in the life of the process.

use std::sync::OnceLock;

use sage_cpu::Cpu;

/// This machine's processor.
pub(crate) fn cpu() -> &'static Cpu {
    static CPU: OnceLock<Cpu> = OnceLock::new();
    CPU.get_or_init(Cpu::detect)
}

/// What this build computes with on this machine, in words.
pub fn backend_description() -> String {
    let cpu = cpu();
    let sets: Vec<&str> = cpu.machine().instruction_sets.iter().map(|set| set.name()).collect();
    format!("cpu, kernels for {} (of {})", cpu.instruction_set(), sets.join(", "))
}
