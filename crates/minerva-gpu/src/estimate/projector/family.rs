//! The kinds of projectors that llama.cpp knows: whose graph is written down here, and how large their pictures are.

/// How an encoder's graph goes on behind its layers, and what is before them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// SigLIP with a pool, a shuffle of pixels or two products behind it.
    Siglip(Tail),
    /// InternViT.
    InternVl,
    /// Rotary positions in two dimensions.
    Pixtral,
    /// CLIP up to the layer whose output is wanted.
    Llava,
    /// Two frames at once, windows in some layers.
    Qwen2Vl,
    /// As that, with layers whose output goes to the text model beside the last one's.
    Qwen3Vl,
    /// Gemma 4: norms of each head, a mean over squares of patches.
    Gemma4,
    /// Rotary positions, and squares of patches that become one row with a norm and two products.
    Merger(Merger),
    /// As Qwen's two frames, with a convolution over squares of patches and a gated block behind it.
    Glm4V,
    /// Two convolutions over squares of patches.
    Hunyuan,
    /// Convolutions in stages, with attention between some of them.
    Mobile,
    /// Queries that attend to all patches.
    Resampler,
    /// Whisper's encoder.
    Whisper(Sound),
    /// Whisper's layers behind convolutions in two dimensions, over pieces of a second.
    Pieces,
    /// Not written down: a bound.
    Other,
}

/// What is behind SigLIP's layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tail {
    /// A mean over squares of patches, a norm and a product.
    Pool,
    /// Squares of patches become one row; one product.
    Shuffle,
    /// As that, with a norm and two products.
    ShuffleTwice,
    /// Two products, by their numbers.
    Products([u8; 2]),
}

/// What is before and behind the layers of a [`Kind::Merger`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Merger {
    /// Norms of the layers are root mean squares.
    pub(super) is_rms: bool,
    /// Learned positions are stretched to the picture and added.
    pub(super) learns_positions: bool,
    /// Rotary positions are two operations, for rows and columns.
    pub(super) rotates_in_halves: bool,
    /// The norm is behind the squares.
    pub(super) norm_is_behind: bool,
    /// The two products, by their numbers.
    pub(super) products: [u8; 2],
}

const KIMI: Merger =
    Merger { is_rms: false, learns_positions: true, rotates_in_halves: true, norm_is_behind: true, products: [1, 2] };
const PADDLE: Merger = Merger { rotates_in_halves: false, norm_is_behind: false, ..KIMI };
const DOTS: Merger = Merger { is_rms: true, learns_positions: false, products: [0, 2], ..PADDLE };

/// What is behind Whisper's layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sound {
    /// Neighbouring positions are averaged.
    pub(super) averages: bool,
    /// Several positions become one row.
    pub(super) stacks: bool,
    pub(super) end: SoundEnd,
}

/// How the rows get the width of the text model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SoundEnd {
    /// Norm, gated product, norm, product.
    GatedBetweenNorms,
    /// One product.
    Product,
    /// A norm before the positions are stacked, two products, and a token at either end.
    BetweenTokens,
    /// Two products with an activation between them.
    TwoProducts,
}

/// The picture that memory is reserved for when the file is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AtLoad {
    /// The size in the header.
    ImageSize,
    /// A square of so many output tokens per side.
    Side(u32),
    /// A square as large as the largest.
    Largest,
}

/// The largest picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Largest {
    /// The size in the header: larger ones are shrunk or cut into such.
    ImageSize,
    /// So many output tokens, unless the user says otherwise.
    Tokens(u32),
    /// As many pixels as the header says; so many output tokens where it does not.
    Pixels(u32),
    /// A square with such an edge (`clip.vision.preproc_image_size`), or the header's size.
    LongestEdge,
}

/// A kind of projector: `clip.projector_type` and what follows from it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Family {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) at_load: AtLoad,
    pub(super) largest: Largest,
    /// Patches per side that become one output token where the header does not say.
    pub(super) merge: u32,
    /// What the header calls that.
    pub(super) merge_key: Option<&'static str>,
    /// Old files have the two products of the feed-forward block the wrong way round.
    pub(super) may_be_swapped: bool,
}

const SCALE: Option<&str> = Some("projector.scale_factor");
const SPATIAL: Option<&str> = Some("spatial_merge_size");

const fn family(name: &'static str, kind: Kind, at_load: AtLoad, largest: Largest) -> Family {
    Family { name, kind, at_load, largest, merge: 1, merge_key: None, may_be_swapped: false }
}

const fn fixed(name: &'static str, kind: Kind) -> Family {
    family(name, kind, AtLoad::ImageSize, Largest::ImageSize)
}

const fn side(name: &'static str, kind: Kind, side: u32, largest: Largest) -> Family {
    family(name, kind, AtLoad::Side(side), largest)
}

const fn sound(name: &'static str, averages: bool, stacks: bool, end: SoundEnd) -> Family {
    fixed(name, Kind::Whisper(Sound { averages, stacks, end }))
}

impl Family {
    const fn merges(self, merge: u32, merge_key: Option<&'static str>) -> Self {
        Self { merge, merge_key, ..self }
    }

    const fn swapped(self) -> Self {
        Self { may_be_swapped: true, ..self }
    }

    /// The family of a `clip.projector_type`.
    pub(super) fn of(name: &str) -> Option<&'static Self> {
        FAMILIES.iter().find(|family| family.name == name)
    }
}

/// Source: `load_hparams` and `clip_get_graph_builder` of `clip.cpp` at the pinned release.
static FAMILIES: [Family; 56] = {
    use Kind::{
        Gemma4, Glm4V, Hunyuan, InternVl, Llava, Merger, Mobile, Other, Pieces, Pixtral, Qwen2Vl, Qwen3Vl, Resampler,
        Siglip,
    };
    use Largest::{LongestEdge, Pixels, Tokens};
    [
        fixed("mlp", Llava).swapped(),
        fixed("ldp", Other).swapped(),
        fixed("ldpv2", Other).swapped(),
        fixed("resampler", Resampler).swapped(),
        fixed("adapter", Other).swapped(),
        fixed("gemma3", Siglip(Tail::Pool)).merges(4, SCALE).swapped(),
        fixed("idefics3", Siglip(Tail::Shuffle)).merges(1, SCALE).swapped(),
        family("lfm2", Siglip(Tail::ShuffleTwice), AtLoad::Largest, Tokens(256)).merges(1, SCALE),
        fixed("janus_pro", Siglip(Tail::Products([0, 1]))),
        side("phi4", Siglip(Tail::Products([0, 2])), 16, Pixels(4096)),
        fixed("internvl", InternVl).merges(1, SCALE),
        side("pixtral", Pixtral, 16, Tokens(1024)).merges(1, SPATIAL),
        side("lightonocr", Pixtral, 16, LongestEdge).merges(1, SPATIAL),
        side("qwen2vl_merger", Qwen2Vl, 46, Tokens(4096)).merges(2, SPATIAL).swapped(),
        side("qwen2.5vl_merger", Qwen2Vl, 46, Tokens(4096)).merges(2, SPATIAL).swapped(),
        side("qwen3vl_merger", Qwen3Vl, 46, Tokens(4096)).merges(2, SPATIAL),
        sound("ultravox", false, true, SoundEnd::GatedBetweenNorms),
        sound("qwen2a", true, false, SoundEnd::Product),
        sound("voxtral", true, true, SoundEnd::TwoProducts),
        sound("musicflamingo", true, false, SoundEnd::TwoProducts),
        sound("glma", false, false, SoundEnd::BetweenTokens),
        side("ling3vl", Other, 46, Tokens(4096)).merges(2, SPATIAL),
        fixed("step3vl", Other).merges(4, SCALE),
        fixed("gemma3nv", Mobile).merges(1, SCALE),
        side("gemma4v", Gemma4, 16, Tokens(1120)).merges(3, SCALE),
        side("gemma4uv", Other, 16, Tokens(1120)).merges(3, SCALE),
        fixed("gemma4a", Other),
        fixed("gemma4ua", Other),
        fixed("llama4", Other).merges(1, SCALE),
        fixed("qwen3a", Pieces),
        fixed("meralion", Other),
        side("kimivl", Merger(KIMI), 16, Tokens(1024)).merges(1, SCALE),
        family("kimik25", Other, AtLoad::Largest, Pixels(4096)).merges(1, SCALE),
        side("paddleocr", Merger(PADDLE), 28, Pixels(4096)).merges(2, None),
        fixed("cogvlm", Other),
        side("dots_ocr", Merger(DOTS), 46, Pixels(16384)).merges(1, SCALE),
        side("dots3note_v", Other, 46, Pixels(16384)).merges(1, SPATIAL),
        fixed("dots3note_a", Other),
        fixed("deepseekocr", Other),
        fixed("deepseekocr2", Other),
        side("deepseek4v", Other, 16, Tokens(384)).merges(1, SCALE),
        fixed("lfm2a", Other),
        side("glm4v", Glm4V, 46, Tokens(4096)).merges(2, SPATIAL),
        side("glm5v", Glm4V, 46, Pixels(16384)).merges(2, SPATIAL),
        side("youtuvl", Other, 16, Tokens(62500)).merges(2, SPATIAL),
        fixed("nemotron_v2_vl", Other).merges(1, SCALE),
        side("exaone4_5", Other, 46, Pixels(16384)).merges(2, SPATIAL).swapped(),
        side("hunyuanvl", Hunyuan, 32, Pixels(16384)).merges(2, SPATIAL),
        fixed("minicpmv4_6", Other).merges(4, SCALE).swapped(),
        fixed("granite_speech", Other),
        side("mimovl", Other, 46, Pixels(16384)).merges(2, SPATIAL),
        side("minimax_m3", Other, 16, Tokens(576)).merges(2, SPATIAL),
        fixed("granite4_vision", Other),
        fixed("mimo_audio", Other),
        fixed("parakeet", Other),
        side("muse-glimmer", Other, 32, Tokens(4096)).merges(2, SPATIAL),
    ]
};

/// All kinds, by their names.
#[cfg(test)]
pub(super) fn names() -> Vec<&'static str> {
    FAMILIES.iter().map(|family| family.name).collect()
}
