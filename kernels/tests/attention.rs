//! Latent attention equals the written rule bit for bit, whatever the page table, the chunking and the batch.
#![allow(clippy::unwrap_used)]

mod oracle;

use guild_kernels::{Cpu, LatentAttention, LatentFormat, QueryRow};
use oracle::{bits, config, cpus, values};
use proptest::prelude::*;

#[derive(Clone, Copy, Debug)]
struct Shape {
    heads: usize,
    width: usize,
    value_width: usize,
}

const SCALE: f32 = 0.31;

/// Keys by position laid into pages of a cache with foreign data around them.
struct Paged {
    cache: Vec<u8>,
    format: LatentFormat,
    pages: Vec<u32>,
    page_tokens: usize,
    page_stride: usize,
    offset: usize,
    /// What the cache gives back, by position.
    keys: Vec<f32>,
}

/// How keys lie in a cache.
#[derive(Clone, Copy, Debug)]
struct Lay {
    format: LatentFormat,
    page_tokens: usize,
    offset: usize,
    shuffle: usize,
}

impl Lay {
    fn plain(format: LatentFormat, page_tokens: usize) -> Lay {
        Lay {
            format,
            page_tokens,
            offset: 0,
            shuffle: 0,
        }
    }

    fn out(self, keys: &[f32], shape: Shape) -> Paged {
        let Lay {
            format,
            page_tokens,
            offset,
            shuffle,
        } = self;
        let (width, value_width) = (shape.width, shape.value_width);
        let row = format.row_bytes(width, value_width);
        let n = (keys.len() / width).div_ceil(page_tokens).max(1);
        let page_stride = offset + page_tokens * row + 3;
        // Any step that shares no factor with the prime number of pages visits each once.
        let total = (n..)
            .find(|t| *t > 1 && (2..*t).all(|d| t % d != 0))
            .unwrap();
        let pages: Vec<u32> = (0..n)
            .map(|i| ((i * (shuffle % (total - 1) + 1) + shuffle) % total) as u32)
            .collect();
        let mut cache = vec![0xff; total * page_stride];
        let mut stored = vec![0.0; keys.len()];
        for (t, (key, stored)) in keys.chunks(width).zip(stored.chunks_mut(width)).enumerate() {
            let page = pages[t / page_tokens] as usize;
            let at = page * page_stride + offset + t % page_tokens * row;
            format.write(key, value_width, &mut cache[at..at + row]);
            format.read(&cache[at..at + row], value_width, stored);
        }
        Paged {
            cache,
            format,
            pages,
            page_tokens,
            page_stride,
            offset,
            keys: stored,
        }
    }
}

fn job<'a>(
    q: &'a [f32],
    out: &'a mut [f32],
    shape: Shape,
    paged: &'a Paged,
    rows: &'a [QueryRow<'a>],
) -> LatentAttention<'a> {
    LatentAttention {
        q,
        out,
        heads: shape.heads,
        width: shape.width,
        value_width: shape.value_width,
        scale: SCALE,
        rows,
        cache: &paged.cache,
        format: paged.format,
        page_tokens: paged.page_tokens,
        page_stride: paged.page_stride,
        offset: paged.offset,
    }
}

fn attend(cpu: &Cpu, q: &[f32], shape: Shape, paged: &Paged, visible: &[usize]) -> Vec<f32> {
    let rows: Vec<_> = visible
        .iter()
        .map(|&visible| QueryRow {
            pages: &paged.pages,
            visible,
        })
        .collect();
    let mut out = vec![f32::NAN; rows.len() * shape.heads * shape.value_width];
    cpu.attend_latent(job(q, &mut out, shape, paged, &rows));
    out
}

const FORMATS: [LatentFormat; 3] = [LatentFormat::F32, LatentFormat::Bf16, LatentFormat::Fp8];

proptest! {
    #![proptest_config(config(60))]

    #[test]
    fn odd_shapes_follow_the_rule(
        heads in 1usize..22, value_width in 1usize..150, rope in 0usize..20, keys in 1usize..150, n in 1usize..4,
        page_tokens in 1usize..40, offset in 0usize..50, shuffle in 0usize..100, format in 0usize..3, seed: u64,
    ) {
        let shape = Shape { heads, width: value_width + rope, value_width };
        let seed = seed >> 1;
        let lay = Lay { format: FORMATS[format], page_tokens, offset, shuffle };
        let paged = lay.out(&values(seed, keys * shape.width), shape);
        let q: Vec<f32> = values(seed + 1, n * heads * shape.width).iter().map(|x| x * 3.0).collect();
        let visible: Vec<usize> = (0..n).map(|i| keys * (i + 1) / n).collect();
        let rows: Vec<_> = visible.iter().map(|&visible| QueryRow { pages: &paged.pages, visible }).collect();
        let expected = bits(&oracle::attend(&job(&q, &mut [], shape, &paged, &rows), &paged.keys));
        for cpu in cpus() {
            prop_assert_eq!(&bits(&attend(&cpu, &q, shape, &paged, &visible)), &expected, "{:?}", cpu);
        }
    }
}

/// Rows that see one, two and three spans of positions, few and many of them, with few heads and with many.
#[test]
fn spans_follow_the_rule_however_they_are_shared_out() {
    for (heads, visible) in [
        (2, vec![1100]),
        (5, vec![513, 1, 512]),
        (70, vec![1025]),
        (3, (1000..1060).collect()),
    ] {
        let shape = Shape {
            heads,
            width: 48,
            value_width: 32,
        };
        let keys = values(3, visible.iter().max().unwrap() * shape.width);
        let q = values(4, visible.len() * heads * shape.width);
        for format in FORMATS {
            let paged = Lay::plain(format, 16).out(&keys, shape);
            let rows: Vec<_> = visible
                .iter()
                .map(|&visible| QueryRow {
                    pages: &paged.pages,
                    visible,
                })
                .collect();
            let job = job(&q, &mut [], shape, &paged, &rows);
            let expected = bits(&oracle::attend(&job, &paged.keys));
            for cpu in cpus() {
                let got = attend(&cpu, &q, shape, &paged, &visible);
                assert_eq!(bits(&got), expected, "{heads} heads, {format}, {cpu:?}");
            }
        }
    }
}

/// A model's widths, and enough work for the threads.
#[test]
fn pages_chunks_and_batch_do_not_show() {
    let shape = Shape {
        heads: 16,
        width: 576,
        value_width: 512,
    };
    let n = 130;
    let keys = values(1, n * shape.width);
    let q = values(2, n * shape.heads * shape.width);
    let visible: Vec<usize> = (1..=n).collect();
    let (q_row, out_row) = (shape.heads * shape.width, shape.heads * shape.value_width);
    for format in FORMATS {
        let plain = Lay::plain(format, n).out(&keys, shape);
        let expected = attend(&Cpu::new(1), &q, shape, &plain, &visible);
        for cpu in cpus()
            .into_iter()
            .filter(|cpu| cpu.isa() != guild_kernels::Isa::Portable)
        {
            for (page_tokens, offset, shuffle) in [(n, 0, 0), (16, 100, 5), (7, 1, 3), (64, 0, 1)] {
                let lay = Lay {
                    format,
                    page_tokens,
                    offset,
                    shuffle,
                };
                let paged = lay.out(&keys, shape);
                let all = attend(&cpu, &q, shape, &paged, &visible);
                assert_eq!(bits(&all), bits(&expected), "{lay:?} on {cpu:?}");
                for chunk in [1, 19, 64] {
                    for (i, visible) in visible.chunks(chunk).enumerate() {
                        let q = &q[i * chunk * q_row..][..visible.len() * q_row];
                        let expected = &expected[i * chunk * out_row..][..visible.len() * out_row];
                        let got = attend(&cpu, q, shape, &paged, visible);
                        assert_eq!(
                            bits(&got),
                            bits(expected),
                            "chunks of {chunk}, {lay:?}, {cpu:?}"
                        );
                    }
                }
            }
        }
    }
}

/// Whatever a NaN or an infinity in the cache meets is no number, never a wrong one.
#[test]
fn what_is_not_finite_shows() {
    let shape = Shape {
        heads: 5,
        width: 48,
        value_width: 32,
    };
    for format in FORMATS {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut keys = values(5, 600 * shape.width);
            keys[77 * shape.width..][..shape.width].fill(bad);
            let paged = Lay::plain(format, 16).out(&keys, shape);
            let q = values(6, 2 * shape.heads * shape.width);
            for cpu in cpus() {
                let out = attend(&cpu, &q, shape, &paged, &[77, 600]);
                let (before, after) = out.split_at(shape.heads * shape.value_width);
                assert!(before.iter().all(|x| x.is_finite()), "{format} {cpu:?}");
                assert!(after.iter().all(|x| x.is_nan()), "{format} {bad} {cpu:?}");
            }
        }
    }
}

#[test]
fn a_row_that_sees_nothing_gives_zero() {
    let shape = Shape {
        heads: 2,
        width: 5,
        value_width: 3,
    };
    let paged = Lay::plain(LatentFormat::F32, 2).out(&values(1, 10), shape);
    for cpu in cpus() {
        assert_eq!(attend(&cpu, &[1.0; 10], shape, &paged, &[0]), vec![0.0; 6]);
        assert_eq!(attend(&cpu, &[], shape, &paged, &[]), Vec::<f32>::new());
    }
}

#[test]
#[should_panic(expected = "need 2 pages, the table has 1")]
fn a_short_page_table_is_refused() {
    let shape = Shape {
        heads: 1,
        width: 5,
        value_width: 3,
    };
    let paged = Lay::plain(LatentFormat::F32, 2).out(&values(1, 10), shape);
    attend(&Cpu::new(1), &[1.0; 5], shape, &paged, &[3]);
}
