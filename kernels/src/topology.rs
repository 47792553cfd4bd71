//! Processors and memories as the system tells of them, and the binding of threads to processors.
//!
//! Secret: where the system says it (`/sys/devices/system` on Linux; elsewhere nothing is known, and every processor counts as a
//! core of the one node). Knows nothing of work.

use std::{fs, path::Path, thread};

/// What this process may use of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// One logical processor for each physical core, ascending.
    pub cores: Vec<usize>,
    /// Nodes of memory that any of the processors belong to; one where the system tells of none.
    pub nodes: Vec<Node>,
}

/// A memory, and the processors that are near it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// As the system counts.
    pub number: usize,
    /// Logical processors that this process may use, ascending.
    pub processors: Vec<usize>,
}

impl Topology {
    /// Of this machine, as far as this process may use it.
    pub fn here() -> Topology {
        Topology::read(Path::new("/sys/devices/system"), allowed())
    }

    /// As `root` tells, `allowed` being the logical processors of this process, ascending.
    fn read(root: &Path, allowed: Vec<usize>) -> Topology {
        let mut cores = Vec::new();
        let mut seen = Vec::new();
        for &processor in &allowed {
            let siblings = root.join(format!("cpu/cpu{processor}/topology/thread_siblings_list"));
            let siblings = list(&siblings).unwrap_or_else(|| vec![processor]);
            if !seen.contains(&processor) {
                cores.push(processor);
                seen.extend(siblings);
            }
        }
        let mut nodes: Vec<Node> = fs::read_dir(root.join("node"))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name();
                let number = name.to_str()?.strip_prefix("node")?.parse().ok()?;
                let mut processors = list(&entry.path().join("cpulist"))?;
                processors.retain(|processor| allowed.contains(processor));
                Some(Node { number, processors })
            })
            .filter(|node| !node.processors.is_empty())
            .collect();
        nodes.sort_by_key(|node| node.number);
        if nodes.is_empty() {
            nodes.push(Node {
                number: 0,
                processors: allowed,
            });
        }
        Topology { cores, nodes }
    }
}

/// A list as Linux writes it: `0-3,8,10-11`.
fn list(path: &Path) -> Option<Vec<usize>> {
    let text = fs::read_to_string(path).ok()?;
    let mut all = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let (from, to): (usize, usize) = (from.parse().ok()?, to.parse().ok()?);
        // Nobody has so many; a file that says so is not what it should be.
        if from > to || to >= MAX_PROCESSORS {
            return None;
        }
        all.extend(from..=to);
    }
    Some(all)
}

/// More logical processors than any machine has.
const MAX_PROCESSORS: usize = 1 << 16;

/// Logical processors this thread may run on, ascending.
fn allowed() -> Vec<usize> {
    #[cfg(target_os = "linux")]
    if let Ok(set) = rustix::thread::sched_getaffinity(None) {
        let all = 0..rustix::thread::CpuSet::MAX_CPU;
        return all.filter(|&processor| set.is_set(processor)).collect();
    }
    (0..thread::available_parallelism().map_or(1, usize::from)).collect()
}

/// A thread, as far as it can be bound.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Thread(#[cfg(target_os = "linux")] rustix::thread::Pid);

impl Thread {
    /// The calling one.
    pub(crate) fn this() -> Thread {
        Thread(
            #[cfg(target_os = "linux")]
            rustix::thread::gettid(),
        )
    }

    /// Keeps it on one logical processor; says whether the system did it.
    #[cfg(target_os = "linux")]
    pub(crate) fn bind(self, processor: usize) -> bool {
        let mut set = rustix::thread::CpuSet::new();
        if processor >= rustix::thread::CpuSet::MAX_CPU {
            return false;
        }
        set.set(processor);
        rustix::thread::sched_setaffinity(Some(self.0), &set).is_ok()
    }

    /// Threads cannot be bound here.
    #[cfg(not(target_os = "linux"))]
    pub(crate) fn bind(self, _processor: usize) -> bool {
        false
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A machine as Linux would tell of it: files by path and content.
    fn machine(name: &str, files: &[(&str, &str)], allowed: Vec<usize>) -> Topology {
        let root =
            std::env::temp_dir().join(format!("guild-topology-{name}-{}", std::process::id()));
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let topology = Topology::read(&root, allowed);
        if root.exists() {
            fs::remove_dir_all(root).unwrap();
        }
        topology
    }

    fn node(number: usize, processors: &[usize]) -> Node {
        Node {
            number,
            processors: processors.to_vec(),
        }
    }

    #[test]
    fn two_sockets_with_two_threads_a_core() {
        let files = [
            ("cpu/cpu0/topology/thread_siblings_list", "0,4\n"),
            ("cpu/cpu1/topology/thread_siblings_list", "1,5\n"),
            ("cpu/cpu2/topology/thread_siblings_list", "2,6\n"),
            ("cpu/cpu3/topology/thread_siblings_list", "3,7\n"),
            ("cpu/cpu4/topology/thread_siblings_list", "0,4\n"),
            ("cpu/cpu5/topology/thread_siblings_list", "1,5\n"),
            ("cpu/cpu6/topology/thread_siblings_list", "2,6\n"),
            ("cpu/cpu7/topology/thread_siblings_list", "3,7\n"),
            ("node/node0/cpulist", "0-1,4-5\n"),
            ("node/node1/cpulist", "2-3,6-7\n"),
            // Memory without processors, and what is no node.
            ("node/node2/cpulist", "\n"),
            ("node/online", "0-2\n"),
        ];
        let all = machine("two", &files, (0..8).collect());
        assert_eq!(all.cores, [0, 1, 2, 3]);
        assert_eq!(all.nodes, [node(0, &[0, 1, 4, 5]), node(1, &[2, 3, 6, 7])]);
        // A process that may use a part of it.
        let part = machine("part", &files, vec![5, 6, 7]);
        assert_eq!(part.cores, [5, 6, 7]);
        assert_eq!(part.nodes, [node(0, &[5]), node(1, &[6, 7])]);
    }

    #[test]
    fn a_machine_that_tells_nothing_is_one_node() {
        for files in [
            &[][..],
            &[
                ("node/node0/cpulist", "0-99999999"),
                ("node/nodex/cpulist", "0"),
            ],
        ] {
            let silent = machine("silent", files, vec![0, 2]);
            assert_eq!(silent.cores, [0, 2]);
            assert_eq!(silent.nodes, [node(0, &[0, 2])]);
        }
    }

    #[test]
    fn a_bound_thread_stays_where_it_is() {
        let here = Topology::here();
        assert!(!here.cores.is_empty() && !here.nodes.is_empty());
        let last = *here.cores.last().unwrap();
        let bound = thread::spawn(move || Thread::this().bind(last).then(allowed)).join();
        if let Some(allowed) = bound.unwrap() {
            assert_eq!(allowed, [last]);
        }
        assert!(!Thread::this().bind(usize::MAX));
    }
}
