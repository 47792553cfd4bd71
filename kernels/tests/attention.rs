//! Latent attention equals the written rule bit for bit, whatever the page table, the chunking and the batch.
#![allow(clippy::unwrap_used)]

mod oracle;

use guild_kernels::{Cpu, LatentAttention, QueryRow};
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
    cache: Vec<f32>,
    pages: Vec<u32>,
    page_tokens: usize,
    page_stride: usize,
    offset: usize,
}

fn lay(keys: &[f32], width: usize, page_tokens: usize, offset: usize, shuffle: usize) -> Paged {
    let n = (keys.len() / width).div_ceil(page_tokens).max(1);
    let page_stride = offset + page_tokens * width + 3;
    // Any step that shares no factor with the prime number of pages visits each once.
    let total = (n..)
        .find(|t| *t > 1 && (2..*t).all(|d| t % d != 0))
        .unwrap();
    let pages: Vec<u32> = (0..n)
        .map(|i| ((i * (shuffle % (total - 1) + 1) + shuffle) % total) as u32)
        .collect();
    let mut cache = vec![f32::NAN; total * page_stride];
    for (t, key) in keys.chunks(width).enumerate() {
        let at = pages[t / page_tokens] as usize * page_stride + offset + t % page_tokens * width;
        cache[at..at + width].copy_from_slice(key);
    }
    Paged {
        cache,
        pages,
        page_tokens,
        page_stride,
        offset,
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

proptest! {
    #![proptest_config(config(60))]

    #[test]
    fn odd_shapes_follow_the_rule(
        heads in 1usize..22, value_width in 1usize..90, rope in 0usize..20, keys in 1usize..150, n in 1usize..4,
        page_tokens in 1usize..40, offset in 0usize..50, shuffle in 0usize..100, seed: u64,
    ) {
        let shape = Shape { heads, width: value_width + rope, value_width };
        let seed = seed >> 1;
        let paged = lay(&values(seed, keys * shape.width), shape.width, page_tokens, offset, shuffle);
        let q: Vec<f32> = values(seed + 1, n * heads * shape.width).iter().map(|x| x * 3.0).collect();
        let visible: Vec<usize> = (0..n).map(|i| keys * (i + 1) / n).collect();
        let rows: Vec<_> = visible.iter().map(|&visible| QueryRow { pages: &paged.pages, visible }).collect();
        let expected = bits(&oracle::attend(&job(&q, &mut [], shape, &paged, &rows)));
        for cpu in cpus() {
            prop_assert_eq!(&bits(&attend(&cpu, &q, shape, &paged, &visible)), &expected, "{:?}", cpu);
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
    let plain = lay(&keys, shape.width, n, 0, 0);
    let expected = attend(&Cpu::new(1), &q, shape, &plain, &visible);
    let (q_row, out_row) = (shape.heads * shape.width, shape.heads * shape.value_width);
    for cpu in cpus()
        .into_iter()
        .filter(|cpu| cpu.isa() != guild_kernels::Isa::Portable)
    {
        for (page_tokens, offset, shuffle) in [(n, 0, 0), (16, 100, 5), (7, 1, 3), (64, 0, 1)] {
            let paged = lay(&keys, shape.width, page_tokens, offset, shuffle);
            assert_eq!(
                bits(&attend(&cpu, &q, shape, &paged, &visible)),
                bits(&expected),
                "pages of {page_tokens} on {cpu:?}"
            );
            for chunk in [1, 19, 64] {
                for (i, visible) in visible.chunks(chunk).enumerate() {
                    let q = &q[i * chunk * q_row..][..visible.len() * q_row];
                    let expected = &expected[i * chunk * out_row..][..visible.len() * out_row];
                    assert_eq!(
                        bits(&attend(&cpu, q, shape, &paged, visible)),
                        bits(expected),
                        "chunks of {chunk} on {cpu:?}"
                    );
                }
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
    let paged = lay(&values(1, 10), 5, 2, 0, 0);
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
    let paged = lay(&values(1, 10), 5, 2, 0, 0);
    attend(&Cpu::new(1), &[1.0; 5], shape, &paged, &[3]);
}
