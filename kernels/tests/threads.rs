//! The threads do every piece once, from any caller.
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicUsize, Ordering};

use guild_kernels::{Cpu, Isa};

#[test]
fn every_piece_is_done_once() {
    for threads in [1, 2, 5] {
        let cpu = Cpu::new(threads);
        assert_eq!(cpu.threads(), threads);
        for n in [0, 1, 2, 1000] {
            let counts: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
            cpu.par_for(n, |i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            let mut data = vec![usize::MAX; n];
            cpu.par_chunks(&mut data, 7, |i, piece| {
                piece
                    .iter_mut()
                    .enumerate()
                    .for_each(|(j, d)| *d = i * 7 + j)
            });
            assert!(data.iter().enumerate().all(|(i, d)| i == *d));
        }
    }
}

#[test]
fn callers_share_and_nest() {
    let cpu = Cpu::new(3);
    let total = AtomicUsize::new(0);
    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                for _ in 0..50 {
                    cpu.par_for(8, |_| {
                        cpu.par_for(4, |_| {
                            total.fetch_add(1, Ordering::Relaxed);
                        });
                    });
                }
            });
        }
    });
    assert_eq!(total.into_inner(), 4 * 50 * 8 * 4);
}

#[test]
fn a_panic_is_the_callers_and_the_threads_go_on() {
    let cpu = Cpu::new(3);
    for bad in [0, 17, 99] {
        let done = AtomicUsize::new(0);
        let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            cpu.par_for(100, |i| {
                assert!(i != bad, "piece {i}");
                done.fetch_add(1, Ordering::Relaxed);
            });
        }));
        let message = run.unwrap_err().downcast::<String>().unwrap();
        assert_eq!(*message, format!("piece {bad}"));
        assert!(done.into_inner() < 100);
        let all = AtomicUsize::new(0);
        cpu.par_for(100, |_| {
            all.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(all.into_inner(), 100);
    }
}

/// Threads that have gone to sleep between operations are woken by the next.
#[test]
fn pauses_lose_no_piece() {
    let cpu = Cpu::new(4);
    for pause in [0, 20, 49, 50, 51, 80, 2000] {
        for _ in 0..50 {
            let sum = AtomicUsize::new(0);
            cpu.par_for(9, |i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 36);
            std::thread::sleep(std::time::Duration::from_micros(pause));
        }
    }
}

/// Where threads run does not show in what they do; the caller's is left alone.
#[test]
fn threads_may_be_kept_on_cores() {
    let cores = guild_kernels::topology::Topology::here().cores.len();
    let cpu = Cpu::new(3);
    assert!(!cpu.describe().contains("kept on"));
    let kept = cpu.pin_threads();
    assert!(kept < cores.min(cpu.threads()), "{kept} of {cores} cores");
    let told = format!("3 threads ({kept} kept on a core each)");
    assert_eq!(cpu.describe().contains(&told), kept > 0);
    let sum = AtomicUsize::new(0);
    cpu.par_for(100, |i| {
        sum.fetch_add(i, Ordering::Relaxed);
    });
    assert_eq!(sum.into_inner(), 4950);
}

#[test]
fn the_choice_is_told() {
    let available = Isa::available();
    assert_eq!(available.last(), Some(&Isa::Portable));
    let cpu = Cpu::new(0);
    assert_eq!(cpu.isa(), available[0]);
    if cfg!(target_arch = "aarch64") {
        assert!(available.contains(&Isa::Neon), "every aarch64 has it");
    }
    assert!(cpu.threads() >= 1);
    for (isa, refused) in Isa::survey() {
        assert_eq!(refused.is_none(), available.contains(&isa), "{refused:?}");
        assert_eq!(isa.name().parse(), Ok(isa));
        let cpu = Cpu::with_isa(1, isa);
        assert_eq!(cpu.is_some(), available.contains(&isa));
        assert!(cpu.is_none_or(|cpu| cpu.numerics_class() == "f32-fma16-v2"
            && cpu.describe().contains(&format!("{isa:?}"))));
    }
}

#[test]
fn a_file_is_mapped_as_it_is() {
    let path = std::env::temp_dir().join(format!("guild-kernels-map-{}", std::process::id()));
    std::fs::write(&path, b"weights").unwrap();
    let mapped = guild_kernels::file::map(&std::fs::File::open(&path).unwrap()).unwrap();
    assert_eq!(mapped.as_ref(), b"weights");
    std::fs::remove_file(&path).unwrap();
    assert_eq!(&mapped[..3], b"wei");
}
