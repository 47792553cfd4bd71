//! A TCP proxy that does to connections what a bad network does: bytes that are spoiled, lost or
//! come twice, delay, silence.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Pieces of a direction that may be under way at the same time; then the sender is held up. So many that a delay
/// costs no throughput.
const UNDER_WAY: usize = 4096;
/// How often a silent proxy looks whether it may go on.
const SILENT_CHECK: Duration = Duration::from_millis(5);

/// A proxy to one address; without faults at first. It runs until the test process ends.
pub struct Proxy {
    address: String,
    faults: Arc<Faults>,
}

/// What becomes of bytes, now and then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// One bit is another.
    Flip,
    /// The rest of what has just come is lost. Half the time the connection ends with it, else it
    /// goes on behind the gap.
    Truncate,
    /// What has just come comes twice: half the time all of it, which is often whole frames, else a
    /// part.
    Duplicate,
}

#[derive(Default)]
struct Faults {
    /// Over both directions and all connections, so that every part of a connection gets its share.
    spoiling: Mutex<Spoiling>,
    delay_us: AtomicU64,
    silent: AtomicBool,
    damages: AtomicU64,
    connections: AtomicU64,
    bytes: AtomicU64,
}

#[derive(Default)]
struct Spoiling {
    /// What is done, and after how many bytes in the mean.
    doing: Option<(Damage, u64)>,
    /// Bytes until the next time.
    left: u64,
    random: u64,
}

impl Proxy {
    /// Listens on a free loopback port for connections to `target`, which need not be there yet.
    pub fn to(target: String) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let faults = Arc::new(Faults::default());
        let shared = Arc::clone(&faults);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // A client whose server is not there sees its connection closed.
                if let Ok(server) = TcpStream::connect(&target) {
                    shared.connections.fetch_add(1, Ordering::SeqCst);
                    join(&shared, client, server);
                }
            }
        });
        Proxy { address, faults }
    }

    /// Where it listens.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Does that once in so many bytes in the mean, in both directions; None: nothing more.
    pub fn spoil(&self, doing: Option<(Damage, u64)>) {
        self.faults.spoiling.lock().unwrap().doing = doing;
    }

    /// Holds every byte up for so long, in each direction, in the order they came; as many as there are.
    pub fn delay(&self, by: Duration) {
        let us = by.as_micros() as u64;
        self.faults.delay_us.store(us, Ordering::SeqCst);
    }

    /// Forwards nothing, not even the end of a connection, until told to go on.
    pub fn black_hole(&self, on: bool) {
        self.faults.silent.store(on, Ordering::SeqCst);
    }

    /// How often it has spoiled something so far.
    pub fn damages(&self) -> u64 {
        self.faults.damages.load(Ordering::SeqCst)
    }

    /// Connections so far.
    pub fn connections(&self) -> u64 {
        self.faults.connections.load(Ordering::SeqCst)
    }

    /// Bytes forwarded so far, both directions together.
    pub fn bytes(&self) -> u64 {
        self.faults.bytes.load(Ordering::SeqCst)
    }
}

/// Forwards between two ends of a connection, each direction on its own.
fn join(faults: &Arc<Faults>, client: TcpStream, server: TcpStream) {
    for end in [&client, &server] {
        end.set_nodelay(true).unwrap();
    }
    let back = (server.try_clone().unwrap(), client.try_clone().unwrap());
    for (from, to) in [(client, server), back] {
        let (pieces, arriving) = sync_channel(UNDER_WAY);
        let (reading, writing) = (Arc::clone(faults), Arc::clone(faults));
        thread::spawn(move || reading.read(from, &pieces));
        thread::spawn(move || writing.write(to, &arriving));
    }
}

impl Faults {
    fn read(&self, mut from: TcpStream, pieces: &SyncSender<(Instant, Vec<u8>)>) {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            let delay = Duration::from_micros(self.delay_us.load(Ordering::SeqCst));
            let mut piece = buffer[..n].to_vec();
            let goes_on = self.spoil(&mut piece);
            if pieces.send((Instant::now() + delay, piece)).is_err() || !goes_on {
                break;
            }
        }
    }

    fn write(&self, mut to: TcpStream, arriving: &Receiver<(Instant, Vec<u8>)>) {
        let silence = || {
            while self.silent.load(Ordering::SeqCst) {
                thread::sleep(SILENT_CHECK);
            }
        };
        for (due, piece) in arriving {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            silence();
            if to.write_all(&piece).is_err() {
                break;
            }
            self.bytes.fetch_add(piece.len() as u64, Ordering::SeqCst);
        }
        silence();
        // One that is gone already needs no farewell.
        let _ = to.shutdown(Shutdown::Both);
    }

    /// Whether the connection goes on behind the piece.
    fn spoil(&self, piece: &mut Vec<u8>) -> bool {
        let mut spoiling = self.spoiling.lock().unwrap();
        let Some((damage, every)) = spoiling.doing else {
            return true;
        };
        let mut goes_on = true;
        let came = piece.len();
        while spoiling.left < came as u64 {
            // A linear congruential generator; its upper bits are the good ones.
            spoiling.random = spoiling
                .random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let random = spoiling.random >> 33;
            let (at, coin) = (spoiling.left as usize, random.is_multiple_of(2));
            match damage {
                Damage::Flip => piece[at] ^= 1 << (random % 8),
                Damage::Truncate => {
                    piece.truncate(at);
                    goes_on &= coin;
                }
                Damage::Duplicate => {
                    let again = if coin { 0..came } else { 0..at };
                    piece.extend_from_within(again);
                }
            }
            self.damages.fetch_add(1, Ordering::SeqCst);
            spoiling.left += 1 + (random >> 3) % (2 * every);
        }
        spoiling.left -= came as u64;
        goes_on
    }
}
