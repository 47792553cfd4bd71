//! Memory that is read in long runs.
//!
//! Secret: that it is a mapping of its own, for which huge pages are asked.

use std::sync::atomic::{AtomicBool, Ordering};

use half::bf16;
use memmap2::{MmapMut, MmapOptions};

/// Zeroed bytes, aligned to the system's page, behind which physical memory stands only where something was written.
/// Huge pages are asked for, unless [`HugePages::Off`] was chosen: fewer addresses to look up, and up to a third more
/// bandwidth where a read misses all caches.
#[derive(Debug)]
pub struct Memory(MmapMut);

/// Whether memory is to have huge pages: a matter of the whole process, as the system's own setting is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HugePages {
    /// Asked for; the system gives them unless it is set to give none.
    Auto,
    /// Refused, whatever the system's setting.
    Off,
}

static REFUSED: AtomicBool = AtomicBool::new(false);

impl HugePages {
    /// From now on, for all memory that is made in this process.
    pub fn choose(self) {
        REFUSED.store(self == HugePages::Off, Ordering::Relaxed);
    }

    /// What was chosen, [`HugePages::Auto`] at first.
    pub fn chosen() -> HugePages {
        if REFUSED.load(Ordering::Relaxed) {
            HugePages::Off
        } else {
            HugePages::Auto
        }
    }

    /// The system's own setting, where it has one: `always`, `madvise` or `never`.
    pub fn of_system() -> Option<String> {
        let path = "/sys/kernel/mm/transparent_hugepage/enabled";
        let text = std::fs::read_to_string(path).ok()?;
        let chosen = text.split_once('[')?.1.split_once(']')?.0;
        Some(chosen.to_owned())
    }
}

impl Memory {
    /// # Errors
    /// The system has no such address space.
    pub fn new(bytes: usize) -> std::io::Result<Memory> {
        // An empty mapping is refused by the system and harmless here.
        let map = MmapOptions::new().len(bytes.max(1)).map_anon()?;
        #[cfg(target_os = "linux")]
        // A wish only: a kernel without huge pages is as good.
        let _ = map.advise(match HugePages::chosen() {
            HugePages::Auto => memmap2::Advice::HugePage,
            HugePages::Off => memmap2::Advice::NoHugePage,
        });
        Ok(Memory(map))
    }

    /// The same bytes as f32, as many as are whole.
    pub fn as_f32(&self) -> &[f32] {
        // SAFETY: every bit pattern is an f32, and `align_to` cuts the slice to whole ones.
        unsafe { self.0.align_to().1 }
    }

    /// The same bytes as bf16, as many as are whole.
    pub fn as_bf16(&self) -> &[bf16] {
        // SAFETY: every bit pattern is a bf16, and `align_to` cuts the slice to whole ones.
        unsafe { self.0.align_to().1 }
    }
}

impl std::ops::Deref for Memory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl std::ops::DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_zeroed_and_one_memory_in_every_type() -> std::io::Result<()> {
        let mut memory = Memory::new(10_001)?;
        assert!(memory.len() >= 10_001 && memory.iter().all(|b| *b == 0));
        memory[4..8].copy_from_slice(&1.5f32.to_le_bytes());
        assert_eq!(memory.as_f32()[..3], [0.0, 1.5, 0.0]);
        assert_eq!(memory.as_bf16()[3].to_f32(), 1.5);
        assert!(Memory::new(0)?.len() <= 1);
        Ok(())
    }

    /// What the system has been told of the pages of `memory`, in its own two letters.
    #[cfg(target_os = "linux")]
    fn flags(memory: &Memory) -> std::io::Result<Vec<String>> {
        let address = memory.as_ptr() as usize;
        let maps = std::fs::read_to_string("/proc/self/smaps")?;
        let holds = |line: &&str| {
            let range = line
                .split(' ')
                .next()
                .and_then(|range| range.split_once('-'));
            let number = |hex| usize::from_str_radix(hex, 16);
            let Some((Ok(from), Ok(to))) = range.map(|(from, to)| (number(from), number(to)))
            else {
                return false;
            };
            (from..to).contains(&address)
        };
        let mut entry = maps.lines().skip_while(|line| !holds(line));
        let flags = entry.find_map(|line| line.strip_prefix("VmFlags:"));
        let flags = flags.unwrap_or_default().split_whitespace();
        Ok(flags.map(str::to_owned).collect())
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn huge_pages_are_asked_for_or_refused() -> std::io::Result<()> {
        assert_eq!(HugePages::chosen(), HugePages::Auto);
        let asked = flags(&Memory::new(4 << 20)?)?;
        HugePages::Off.choose();
        assert_eq!(HugePages::chosen(), HugePages::Off);
        let refused = flags(&Memory::new(4 << 20)?)?;
        HugePages::Auto.choose();
        // Some systems have no such pages, or do not tell.
        if HugePages::of_system().is_some() && !asked.is_empty() {
            assert!(asked.contains(&"hg".to_owned()), "{asked:?}");
            assert!(refused.contains(&"nh".to_owned()), "{refused:?}");
        }
        Ok(())
    }
}
