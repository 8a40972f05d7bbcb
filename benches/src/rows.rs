//! Settings and rows for measuring the sampler: by the clock ([`super::sampler`]) and by instructions (`counts/`).

/// Tokens that a request has seen, so that penalties and DRY have work: a text of 64 different tokens that repeats itself.
pub fn history() -> impl Iterator<Item = i32> {
    (0..1024).map(|i| (i * 37) % 64 * 211)
}

/// Logits like those of a model: a likely head over a bell-shaped body.
pub fn row(n_vocab: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = || {
        // xorshift64*, by Vigna
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 40) as f32 / (1 << 24) as f32
    };
    let mut row: Vec<f32> = (0..n_vocab).map(|_| (0..4).map(|_| uniform()).sum::<f32>() * 3.0 - 12.0).collect();
    for i in 0..50_u8 {
        row[(uniform() * n_vocab as f32) as usize % n_vocab] = 8.0 - 0.15 * f32::from(i);
    }
    row
}
