//! Multiplication of bytes by AMX tiles, beside VNNI for what is too small for a tile.
//!
//! Secret: tiles, their configuration, and the permission they need. Knows the contract of [`Dot`], nothing of the
//! algorithms. A machine is taken for one with AMX only after its products have been held against plain Rust.

use std::{
    arch::{
        asm,
        x86_64::{__cpuid, __cpuid_count, _xgetbv},
    },
    sync::OnceLock,
};

pub(crate) mod pairs;

use super::bytes512::{Dpbusd, Vnni};
use crate::generic::int::{Dot, DotOp, FULL, Tile};

/// The capability to run AMX code: holding one proves that this machine has it, that the kernel gave leave, and that the
/// products were right.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Amx(Vnni);

/// Bits of leaf 7, register edx.
const AMX_TILE: u32 = 1 << 24;
const AMX_INT8: u32 = 1 << 25;
/// State components of tiles: configuration and data.
const XTILE: u64 = 1 << 17 | 1 << 18;

impl Amx {
    /// `right` holds the products of a candidate against the rule; it is asked once per process.
    ///
    /// # Errors
    /// Why this machine is not one.
    pub(crate) fn new(right: impl FnOnce(Amx) -> bool) -> Result<Amx, String> {
        static PROVEN: OnceLock<Result<Amx, String>> = OnceLock::new();
        PROVEN
            .get_or_init(|| {
                let vnni = Vnni::new().ok_or("the processor must have AVX-512 with VNNI")?;
                if !has_tiles(AMX_TILE | AMX_INT8) {
                    return Err("the processor must have amx-tile and amx-int8".into());
                }
                permission()?;
                let amx = Amx(vnni);
                if !right(amx) {
                    return Err("its products are not those of the rule".into());
                }
                Ok(amx)
            })
            .clone()
    }

    /// `links` times four independent products of tiles, for the floor that times are held against.
    pub(crate) fn chains(self, links: usize) {
        // SAFETY: `self` exists, so the machine has tiles and the process leave; tiles that were just configured are zero,
        // and nothing is read.
        unsafe {
            pairs::with_tiles(|| {
                for _ in 0..links {
                    asm!(
                        "tdpbsud tmm0, tmm4, tmm6",
                        "tdpbsud tmm1, tmm4, tmm7",
                        "tdpbsud tmm2, tmm5, tmm6",
                        "tdpbsud tmm3, tmm5, tmm7",
                        out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                        options(nostack, nomem, preserves_flags)
                    );
                }
            });
        }
    }

    /// The capability that this one includes.
    pub(crate) fn vnni(self) -> Vnni {
        self.0
    }

    /// # Safety
    /// What `O` asks for besides the instruction set.
    pub(crate) unsafe fn run_dot<O: DotOp>(self, op: O) -> O::Out {
        // SAFETY: `self` exists, so `new` has seen the features and got leave; the rest is the caller's promise.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly, preserves_flags));
            let out = run(op);
            asm!("tilerelease", options(nostack, nomem, preserves_flags));
            out
        }
    }
}

/// Whether the processor has `features`, bits of leaf 7, and the system saves tiles.
fn has_tiles(features: u32) -> bool {
    if !is_x86_feature_detected!("xsave") || __cpuid(0).eax < 7 {
        return false;
    }
    let leaf = __cpuid_count(7, 0);
    // SAFETY: the processor has XSAVE and, AVX-512 being usable, the system has switched it on.
    let saved = unsafe { xcr0() };
    leaf.edx & features == features && saved & XTILE == XTILE
}

/// # Safety
/// The processor has XSAVE, and the system has switched it on.
#[target_feature(enable = "xsave")]
unsafe fn xcr0() -> u64 {
    // SAFETY: the caller's promise.
    unsafe { _xgetbv(0) }
}

/// Asks Linux to let this process use tile data; other systems are not known to.
fn permission() -> Result<(), String> {
    if !cfg!(target_os = "linux") {
        return Err("this system is not known to give leave for tiles".into());
    }
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: a system call that touches no memory of ours; the kernel overwrites rcx and r11 alone.
    unsafe {
        asm!(
            "syscall",
            inout("rax") result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack)
        );
    }
    match result {
        0 => Ok(()),
        error => Err(format!(
            "the kernel gave no leave for tiles (error {})",
            -error
        )),
    }
}

/// What `ldtilecfg` reads: palette 1, then bytes per row of each tile, then rows.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Tile 0: sums. Tiles 1 and 2: x and weights of 64 columns. Tiles 3 and 4: x and weights of 32 columns.
static CONFIG: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 32, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// # Safety
/// The machine has the features named, tiles are configured, and what `O` asks for besides holds.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn run<O: DotOp>(op: O) -> O::Out {
    // SAFETY: the caller's promise is the one `DotOp::run` asks for.
    unsafe { op.run::<Tiles>() }
}

/// `tdpbsud` takes signed x and unsigned weights as they are stored.
#[derive(Clone, Copy)]
struct Tiles;

/// Lines of weights in a tile.
#[repr(C, align(64))]
struct Unpacked([[u8; 64]; 16]);

// SAFETY, for every block below: the trait's contract gives the instruction set and valid pointers; tiles are as `CONFIG`
// says. Nothing but these blocks uses tiles, so they keep their contents from one to the next.
impl Dot for Tiles {
    type Float = <Dpbusd as Dot>::Float;
    type Sum = <Dpbusd as Dot>::Sum;
    type Weights = <Dpbusd as Dot>::Weights;
    type Word = <Dpbusd as Dot>::Word;

    const ROWS: usize = FULL;
    /// Where rows are too few for tiles.
    const PANELS: usize = 2;
    const OFFSET8: i32 = Dpbusd::OFFSET8;
    const OFFSET4: i32 = Dpbusd::OFFSET4;
    const TILES: bool = true;

    #[inline(always)]
    unsafe fn sum(x: i32) -> Self::Sum {
        // SAFETY: see the top of this impl.
        unsafe { Dpbusd::sum(x) }
    }

    #[inline(always)]
    unsafe fn load8(p: *const u8) -> Self::Weights {
        // SAFETY: see the top of this impl.
        unsafe { Dpbusd::load8(p) }
    }

    #[inline(always)]
    unsafe fn load4(p: *const u8) -> [Self::Weights; 2] {
        // SAFETY: see the top of this impl.
        unsafe { Dpbusd::load4(p) }
    }

    #[inline(always)]
    unsafe fn word(p: *const u32) -> Self::Word {
        // SAFETY: see the top of this impl.
        unsafe { Dpbusd::word(p) }
    }

    #[inline(always)]
    unsafe fn dot(acc: Self::Sum, w: Self::Weights, x: Self::Word) -> Self::Sum {
        // SAFETY: see the top of this impl.
        unsafe { Dpbusd::dot(acc, w, x) }
    }

    #[inline(always)]
    unsafe fn float(sum: Self::Sum) -> Self::Float {
        // SAFETY: see the top of this impl.
        unsafe { Dpbusd::float(sum) }
    }

    #[inline(always)]
    unsafe fn tile<const BITS: usize>(sums: &mut Tile, x: *const u32, w: *const u8, quads: usize) {
        let mut unpacked = Unpacked([[0; 64]; 16]);
        // SAFETY: see the top of this impl; `x` holds 16 rows of `quads` words, run by run, `w` the lines of as many
        // quads, and `unpacked` the lines of one tile.
        unsafe {
            asm!(
                "tileloadd tmm0, [{sums} + {stride}*1]",
                sums = in(reg) &raw const *sums, stride = in(reg) 64usize,
                out("tmm0") _,
                options(nostack, readonly, preserves_flags)
            );
            let run = quads.min(FULL);
            for first in (0..quads).step_by(run) {
                let x = x.add(first * FULL);
                let mut w = w.add(first * BITS * 8);
                if BITS == 4 {
                    for line in 0..run / 2 {
                        for (half, nibbles) in
                            Dpbusd::load4(w.add(line * 64)).into_iter().enumerate()
                        {
                            let to = unpacked.0[line * 2 + half].as_mut_ptr();
                            std::arch::x86_64::_mm512_storeu_si512(to.cast(), nibbles);
                        }
                    }
                    w = unpacked.0.as_ptr().cast();
                }
                if run == FULL {
                    asm!(
                        "tileloadd tmm1, [{x} + {stride}*1]",
                        "tileloadd tmm2, [{w} + {stride}*1]",
                        "tdpbsud tmm0, tmm1, tmm2",
                        x = in(reg) x, w = in(reg) w, stride = in(reg) 64usize,
                        out("tmm1") _, out("tmm2") _,
                        options(nostack, readonly, preserves_flags)
                    );
                } else {
                    asm!(
                        "tileloadd tmm3, [{x} + {x_stride}*1]",
                        "tileloadd tmm4, [{w} + {stride}*1]",
                        "tdpbsud tmm0, tmm3, tmm4",
                        x = in(reg) x, w = in(reg) w, stride = in(reg) 64usize, x_stride = in(reg) 32usize,
                        out("tmm3") _, out("tmm4") _,
                        options(nostack, readonly, preserves_flags)
                    );
                }
            }
            asm!(
                "tilestored [{sums} + {stride}*1], tmm0",
                sums = in(reg) &raw mut *sums, stride = in(reg) 64usize,
                options(nostack, preserves_flags)
            );
        }
    }
}
