//! CPU time that control groups allow this process.
//!
//! Secret: where Linux keeps it, in both versions of cgroups. Elsewhere there is
//! no such limit.

use std::{fs, path::Path};

/// CPUs' worth of time this process may use; `None` without a limit.
pub(crate) fn cpus() -> Option<f64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    allowed(&groups, Path::new("/sys/fs/cgroup"))
}

/// The least of the limits of the groups in `groups` (`hierarchy:controllers:path`
/// a line, cgroups(7)) and of those above them. In a container the path may be
/// one that only the host sees; the root is then the container's own group.
fn allowed(groups: &str, root: &Path) -> Option<f64> {
    let limits = groups.lines().flat_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let controllers = fields.next().unwrap_or_default();
        let path = fields.next().unwrap_or_default();
        let (root, limit): (_, fn(&Path) -> Option<f64>) = match controllers {
            "" => (root.to_path_buf(), version_2),
            of if of.split(',').any(|of| of == "cpu") => (root.join("cpu"), version_1),
            _ => return Vec::new(),
        };
        let group = Path::new(path.trim_start_matches('/'));
        let up = group.ancestors().map(|group| root.join(group));
        up.filter_map(|group| limit(&group)).collect()
    });
    limits.reduce(f64::min)
}

/// `cpu.cfs_quota_us` microseconds, -1 for no limit, of every `cpu.cfs_period_us`.
fn version_1(group: &Path) -> Option<f64> {
    let read = |name: &str| number(&fs::read_to_string(group.join(name)).ok()?);
    ratio(read("cpu.cfs_quota_us")?, read("cpu.cfs_period_us")?)
}

/// `cpu.max`: the same two numbers, or `max` for no limit.
fn version_2(group: &Path) -> Option<f64> {
    let line = fs::read_to_string(group.join("cpu.max")).ok()?;
    let (quota, period) = line.split_once(' ')?;
    ratio(number(quota)?, number(period)?)
}

fn number(text: &str) -> Option<f64> {
    text.trim().parse().ok()
}

fn ratio(quota: f64, period: f64) -> Option<f64> {
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn write(root: &Path, group: &str, files: &[(&str, &str)]) {
        fs::create_dir_all(root.join(group)).unwrap();
        for (name, text) in files {
            fs::write(root.join(group).join(name), text).unwrap();
        }
    }

    #[test]
    fn the_tightest_limit_on_the_way_up_counts_in_both_versions() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let v1 = |quota| {
            [
                ("cpu.cfs_quota_us", quota),
                ("cpu.cfs_period_us", "100000\n"),
            ]
        };
        write(root, "cpu", &v1("-1\n"));
        write(root, "cpu/half", &v1("50000\n"));
        write(root, "cpu/half/more", &v1("70000\n"));
        let v1_group = "5:memory:/m\n1:cpu,cpuacct:/half/more\n0::/\n";
        assert_eq!(allowed(v1_group, root), Some(0.5));
        assert_eq!(allowed("1:cpu:/\n0::/\n", root), None);
        assert_eq!(allowed("2:cpuset:/half\n", root), None);
        // As seen from inside a container.
        write(root, "cpu", &v1("25000\n"));
        assert_eq!(allowed("1:cpu:/docker/0123\n", root), Some(0.25));

        write(root, "a/b", &[("cpu.max", "max 100000\n")]);
        assert_eq!(allowed("0::/a/b\n", root), None);
        write(root, "a", &[("cpu.max", "150000 100000\n")]);
        assert_eq!(allowed("0::/a/b\n", root), Some(1.5));
        write(root, "a", &[("cpu.max", "what\n")]);
        assert_eq!(allowed("0::/a/b\nnothing\n", root), None);
    }
}
