//! How much memory a call takes at its peak.

/// Runs `call` and tells by how many bytes the process's resident memory rose at its highest, or `None` where the
/// system does not say (anything but Linux).
///
/// What an allocator kept from earlier work and reuses does not count, so the figure is that of the first such call.
pub fn peak_increase<T>(call: impl FnOnce() -> T) -> (T, Option<u64>) {
    let before = reset_peak().and_then(|()| status_bytes("VmRSS:"));
    let result = call();
    let peak = before.and_then(|before| Some(status_bytes("VmHWM:")?.saturating_sub(before)));
    (result, peak)
}

/// Makes the present size the highest seen: `5` in `clear_refs` resets the high-water mark.
fn reset_peak() -> Option<()> {
    std::fs::write("/proc/self/clear_refs", "5").ok()
}

/// A size in `/proc/self/status`.
fn status_bytes(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let value = status.lines().find_map(|line| line.strip_prefix(name))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_freed_buffer_is_seen() {
        const BYTES: usize = 64 << 20;
        let (sum, peak) = peak_increase(|| vec![1u8; BYTES].iter().map(|&x| u64::from(x)).sum::<u64>());
        assert_eq!(sum, BYTES as u64);
        let peak = peak.unwrap();
        assert!((BYTES as u64 * 9 / 10..BYTES as u64 * 3 / 2).contains(&peak), "{peak}");
    }
}
