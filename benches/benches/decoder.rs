//! What text costs per token: `cargo bench -p minerva-benches --bench decoder`.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use minerva_engine::decoder::TextDecoder;

/// Tokens of one measurement.
const N_TOKENS: usize = 4096;

/// Words, and now and then a character that three tokens share.
fn tokens() -> Vec<Vec<u8>> {
    let snowman = "\u{2603}".as_bytes();
    let word = |at: usize| [" the", " quick", "ly", " brown", "\n", " fox"][at % 6].as_bytes().to_vec();
    (0..N_TOKENS).map(|at| if at % 64 < 3 { vec![snowman[at % 64]] } else { word(at) }).collect()
}

/// Stop texts that begin like the output, so that something is always held back, and never come.
fn stops(n: usize) -> Vec<String> {
    (0..n).map(|at| format!(" the quickly brown {at}")).collect()
}

fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("decoder");
    group.throughput(Throughput::Elements(N_TOKENS as u64)).warm_up_time(Duration::from_millis(300));
    group.measurement_time(Duration::from_secs(1)).sample_size(20);
    let tokens = tokens();
    for n_stops in [0, 4, 64] {
        let stops = stops(n_stops);
        group.bench_function(BenchmarkId::new("tokens, with stop texts", n_stops), |bencher| {
            bencher.iter(|| {
                let (mut decoder, mut text) = (TextDecoder::new(&stops), String::new());
                for token in &tokens {
                    black_box(decoder.push(token, &mut text));
                }
                decoder.finish(&mut text);
                text
            });
        });
    }
    group.finish();
}

criterion_group!(benches, decode);
criterion_main!(benches);
