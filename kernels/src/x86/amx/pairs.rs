//! Multiplication of pairs of bf16 by AMX tiles.
//!
//! Secret: the instructions. Knows the contract of [`PairTiles`], nothing of the algorithms. A machine is taken for one
//! with them only after its products have been held against plain Rust.

use std::{
    arch::{asm, x86_64::*},
    sync::OnceLock,
};

use super::{AMX_TILE, Config, has_tiles, permission};
use crate::{
    generic::{
        matmul::Line,
        pairs::tiles::{PairTiles, Panel, ROW_BYTES, ROWS, Sums, TileOp},
    },
    x86::pairs512::{Bf16, Dpbf16},
};

/// The capability to run AMX code for bf16: holding one proves that this machine has it, that the kernel gave leave, and
/// that the products were right.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AmxBf16(());

/// Bit of leaf 7, register edx.
const AMX_BF16: u32 = 1 << 22;

impl AmxBf16 {
    /// `right` holds the products of a candidate against the rule; it is asked once per process.
    ///
    /// # Errors
    /// Why this machine is not one.
    pub(crate) fn new(
        bf16: Result<Bf16, String>,
        right: impl FnOnce(AmxBf16) -> bool,
    ) -> Result<AmxBf16, String> {
        static PROVEN: OnceLock<Result<AmxBf16, String>> = OnceLock::new();
        PROVEN
            .get_or_init(|| {
                bf16?;
                if !has_tiles(AMX_TILE | AMX_BF16) {
                    return Err("the processor must have amx-tile and amx-bf16".into());
                }
                permission()?;
                if !right(AmxBf16(())) {
                    return Err("its products are not those of the rule".into());
                }
                Ok(AmxBf16(()))
            })
            .clone()
    }

    /// # Safety
    /// What `O` asks for besides the instruction set.
    pub(crate) unsafe fn run_tiles<O: TileOp>(self, op: O) -> O::Out {
        // SAFETY: `self` exists, so `new` has seen the features and got leave; the rest is the caller's promise.
        unsafe { with_tiles(|| run(op)) }
    }

    /// `links` times four independent products of tiles, for the floor that times are held against.
    pub(crate) fn chains(self, links: usize) {
        // SAFETY: as above; tiles that were just configured are zero, and nothing is read.
        unsafe {
            with_tiles(|| {
                for _ in 0..links {
                    asm!(
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tdpbf16ps tmm1, tmm4, tmm7",
                        "tdpbf16ps tmm2, tmm5, tmm6",
                        "tdpbf16ps tmm3, tmm5, tmm7",
                        out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                        options(nostack, nomem, preserves_flags)
                    );
                }
            });
        }
    }
}

/// Runs `work` while tiles are configured.
///
/// # Safety
/// The machine has tiles, and the process leave to use them.
pub(super) unsafe fn with_tiles<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly, preserves_flags));
        let out = work();
        asm!("tilerelease", options(nostack, nomem, preserves_flags));
        out
    }
}

/// Tiles 0 to 3: sums of panel 0 and tiles 0 and 1 of x, then of panel 1. Tiles 4 and 5: the panels. Tiles 6 and 7: those of
/// x.
static CONFIG: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// # Safety
/// The machine has the features named, tiles are configured, and what `O` asks for besides holds.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx2,fma,f16c")]
unsafe fn run<O: TileOp>(op: O) -> O::Out {
    // SAFETY: the caller's promise is the one `TileOp::run` asks for.
    unsafe { op.run::<Tdpbf16>() }
}

#[derive(Clone, Copy)]
struct Tdpbf16;

macro_rules! load {
    ($tile:tt, $at:expr, $row:expr) => {
        asm!(
            concat!("tileloadd ", $tile, ", [{at} + {row}*1]"),
            at = in(reg) $at, row = in(reg) $row,
            out($tile) _,
            options(nostack, readonly, preserves_flags)
        )
    };
}

macro_rules! store {
    ($tile:tt, $at:expr) => {
        asm!(
            concat!("tilestored [{at} + {row}*1], ", $tile),
            at = in(reg) $at, row = in(reg) ROW_BYTES,
            options(nostack, preserves_flags)
        )
    };
}

macro_rules! multiply {
    ($sums:tt, $w:tt, $x:tt) => {
        asm!(
            concat!("tdpbf16ps ", $sums, ", ", $w, ", ", $x),
            out($sums) _,
            options(nostack, nomem, preserves_flags)
        )
    };
}

// SAFETY, for every block below: the trait's contract gives the instruction set and valid pointers; tiles are as `CONFIG`
// says. Nothing but these blocks uses tiles, so they keep their contents from one to the next.
impl PairTiles for Tdpbf16 {
    type Dot = Dpbf16;

    #[inline(always)]
    unsafe fn multiply<const P: usize, const T: usize>(
        sums: [[*mut Sums; T]; P],
        w: [Panel; P],
        x: [*const Line; T],
        steps: usize,
    ) {
        // SAFETY: see the top of this impl.
        unsafe {
            load!("tmm0", sums[0][0], ROW_BYTES);
            if T > 1 {
                load!("tmm1", sums[0][T - 1], ROW_BYTES);
            }
            if P > 1 {
                load!("tmm2", sums[P - 1][0], ROW_BYTES);
            }
            if P > 1 && T > 1 {
                load!("tmm3", sums[P - 1][T - 1], ROW_BYTES);
            }
            for step in 0..steps {
                for w in w {
                    if w.ahead == 0 {
                        continue;
                    }
                    for r in 0..ROWS {
                        let at = w.at.wrapping_add(step * w.step + r * w.row + w.ahead);
                        _mm_prefetch::<_MM_HINT_T1>(at.cast());
                    }
                }
                load!("tmm4", w[0].at.add(step * w[0].step), w[0].row);
                load!("tmm6", x[0].add(step * ROWS), ROW_BYTES);
                multiply!("tmm0", "tmm4", "tmm6");
                if T > 1 {
                    load!("tmm7", x[T - 1].add(step * ROWS), ROW_BYTES);
                    multiply!("tmm1", "tmm4", "tmm7");
                }
                if P > 1 {
                    load!("tmm5", w[P - 1].at.add(step * w[P - 1].step), w[P - 1].row);
                    multiply!("tmm2", "tmm5", "tmm6");
                }
                if P > 1 && T > 1 {
                    multiply!("tmm3", "tmm5", "tmm7");
                }
            }
            store!("tmm0", sums[0][0]);
            if T > 1 {
                store!("tmm1", sums[0][T - 1]);
            }
            if P > 1 {
                store!("tmm2", sums[P - 1][0]);
            }
            if P > 1 && T > 1 {
                store!("tmm3", sums[P - 1][T - 1]);
            }
        }
    }
}
