//! What a process listens on, by the kernel's own tables.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// State of a socket that listens.
const LISTENING: &str = "0A";
/// State of an unconnected UDP socket.
const UNCONNECTED: &str = "07";

/// Addresses on which a process waits for others, TCP and UDP.
pub(crate) fn open_by(process: u32) -> Vec<SocketAddr> {
    let sockets = sockets(process);
    let mut open = Vec::new();
    for (table, state) in [
        ("tcp", LISTENING),
        ("tcp6", LISTENING),
        ("udp", UNCONNECTED),
        ("udp6", UNCONNECTED),
    ] {
        let rows = std::fs::read_to_string(format!("/proc/{process}/net/{table}"));
        for row in rows.unwrap_or_default().lines().skip(1) {
            let fields: Vec<&str> = row.split_whitespace().collect();
            if fields[3] == state && sockets.contains(&fields[9].to_owned()) {
                open.push(address(fields[1]));
            }
        }
    }
    open
}

/// Inodes of its sockets.
fn sockets(process: u32) -> Vec<String> {
    let files = std::fs::read_dir(format!("/proc/{process}/fd")).unwrap();
    let links = files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
    let links = links.map(|link| link.to_string_lossy().into_owned());
    links
        .filter_map(|link| {
            let inode = link.strip_prefix("socket:[")?.strip_suffix(']')?;
            Some(inode.to_owned())
        })
        .collect()
}

/// `HEX:PORT`, where HEX is a sequence of 32-bit words in the order of the machine.
fn address(text: &str) -> SocketAddr {
    let (host, port) = text.split_once(':').unwrap();
    let words = host.as_bytes().chunks_exact(8);
    let bytes: Vec<u8> = words
        .map(|word| std::str::from_utf8(word).unwrap())
        .flat_map(|word| u32::from_str_radix(word, 16).unwrap().to_ne_bytes())
        .collect();
    let ip = match <[u8; 4]>::try_from(bytes.as_slice()) {
        Ok(v4) => IpAddr::V4(Ipv4Addr::from(v4)),
        Err(_) => {
            let v6 = <[u8; 16]>::try_from(bytes.as_slice()).unwrap();
            IpAddr::V6(Ipv6Addr::from(v6))
        }
    };
    SocketAddr::new(ip, u16::from_str_radix(port, 16).unwrap())
}

#[test]
fn a_socket_that_is_open_is_seen_where_it_is() {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let open = open_by(std::process::id());
    assert!(open.contains(&socket.local_addr().unwrap()), "{open:?}");
}
