//! An etcd of one or several members on loopback; killed when dropped.

use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::process::free_port;

/// Members that know each other from the start.
pub struct Etcd {
    members: Vec<Member>,
    /// Told to members when they start with nothing.
    cluster: String,
}

struct Member {
    name: String,
    data: TempDir,
    client: String,
    peer: String,
    process: Child,
}

impl Etcd {
    /// Starts them. None where etcd is not installed.
    pub fn start(members: usize) -> Option<Etcd> {
        let installed = Command::new("etcd")
            .arg("--version")
            .stdout(Stdio::null())
            .status();
        if installed.is_err() {
            let ci = std::env::var_os("CI").is_some();
            assert!(!ci, "etcd is not installed: cargo xtask test installs it");
            return None;
        }
        let places: Vec<(String, String, String)> = (0..members)
            .map(|at| {
                let url = || format!("http://127.0.0.1:{}", free_port());
                (format!("member-{at}"), url(), url())
            })
            .collect();
        let known = places
            .iter()
            .map(|(name, _, peer)| format!("{name}={peer}"));
        let cluster = known.collect::<Vec<_>>().join(",");
        let members = places.into_iter().map(|(name, client, peer)| {
            let data = tempfile::tempdir().unwrap();
            Member {
                process: run(&name, &data, &client, &peer, &cluster),
                name,
                data,
                client,
                peer,
            }
        });
        Some(Etcd {
            members: members.collect(),
            cluster,
        })
    }

    /// `--store` for keys under `prefix`.
    pub fn store(&self, prefix: &str) -> String {
        let clients = self.members.iter().map(|m| &m.client["http://".len()..]);
        format!("etcd://{}/{prefix}", clients.collect::<Vec<_>>().join(","))
    }

    /// SIGKILL.
    pub fn kill(&mut self, member: usize) {
        let process = &mut self.members[member].process;
        let _ = process.kill();
        let _ = process.wait();
    }

    /// Starts a killed member again with what it has on disk.
    pub fn restart(&mut self, member: usize) {
        let m = &mut self.members[member];
        m.process = run(&m.name, &m.data, &m.client, &m.peer, &self.cluster);
    }

    /// Kills all members, empties their disks and starts them again.
    pub fn wipe(&mut self) {
        let all = 0..self.members.len();
        all.clone().for_each(|member| self.kill(member));
        for member in all {
            self.members[member].data = tempfile::tempdir().unwrap();
            self.restart(member);
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        (0..self.members.len()).for_each(|member| self.kill(member));
    }
}

fn run(name: &str, data: &TempDir, client: &str, peer: &str, cluster: &str) -> Child {
    Command::new("etcd")
        .args(["--name", name])
        .arg("--data-dir")
        .arg(data.path().join("data"))
        .args(["--listen-client-urls", client])
        .args(["--advertise-client-urls", client])
        .args(["--listen-peer-urls", peer])
        .args(["--initial-advertise-peer-urls", peer])
        .args(["--initial-cluster", cluster])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}
