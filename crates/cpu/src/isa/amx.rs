//! Whether this process may use AMX's tiles.

use std::sync::LazyLock;

/// Whether the processor has AMX's tiles of 8-bit integers and of bfloat16, and Linux lets this process use them. Their registers are large,
/// and Linux saves them only for processes that have asked. It refuses where a thread has too small a stack for signals.
pub(super) fn is_allowed() -> bool {
    static ALLOWED: LazyLock<bool> = LazyLock::new(|| {
        /// Asks for a part of the processor's state; in `asm/prctl.h`.
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        /// The registers of tiles.
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        let features = raw_cpuid::CpuId::new().get_extended_feature_info();
        features.is_some_and(|has| has.has_amx_tile() && has.has_amx_int8() && has.has_amx_bf16())
            // SAFETY: the call takes two integers, and changes nothing but what this process may use.
            && unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) } == 0
    });
    *ALLOWED
}
