//! What is done to checkpoints, and what must be named. Places are drawn from a seed.

use std::fs;
use std::path::Path;

use guild_model::checkpoint::manifest::FILE as MANIFEST;
use serde_json::{Value, json};

use crate::file::{
    INDEX, Source, Templates, Tensor, Weights, edit_bytes, edit_json, edit_weights, list,
};

/// One mutation of a copy of a source.
pub(crate) struct Case {
    pub(crate) what: String,
    pub(crate) source: Source,
    /// All of these must be in the message.
    pub(crate) names: Vec<String>,
    /// Whether the manifest lists what is wrong.
    pub(crate) listed: bool,
    pub(crate) apply: Box<dyn Fn(&Path) + Send + Sync>,
}

impl Case {
    pub(crate) fn new(
        what: impl Into<String>,
        source: Source,
        names: &[&str],
        apply: impl Fn(&Path) + Send + Sync + 'static,
    ) -> Case {
        Case {
            what: format!("{source:?}: {}", what.into()),
            source,
            names: names.iter().map(|n| n.to_string()).collect(),
            listed: false,
            apply: Box::new(apply),
        }
    }
}

/// splitmix64 (Steele, Lea, Flood 2014).
struct Draw(u64);

impl Draw {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % n as u64) as usize
    }

    fn of<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

/// Kinds of tensors by a part of their names, and where each occurs.
const CLASSES: [(&str, &[Source]); 18] = [
    (
        "embed_tokens.weight",
        &[Source::Fp8, Source::Shards, Source::Mtp, Source::Packed],
    ),
    ("lm_head.weight", &[Source::Fp8, Source::V2, Source::Demo]),
    (".blob", &[Source::Packed]),
    ("_proj.weight_scale", &[Source::Packed]),
    (
        "model.norm.weight",
        &[Source::Fp8, Source::Shards, Source::V2],
    ),
    ("input_layernorm.weight", &[Source::Fp8, Source::Demo]),
    ("kv_a_layernorm.weight", &[Source::V2, Source::Mtp]),
    ("self_attn.kv_b_proj.weight", &[Source::Fp8, Source::Shards]),
    ("self_attn.o_proj.weight", &[Source::V2, Source::Mtp]),
    ("self_attn.q_b_proj.weight_scale_inv", &[Source::Fp8]),
    (
        ".mlp.gate.weight",
        &[Source::Fp8, Source::Shards, Source::V2],
    ),
    ("e_score_correction_bias", &[Source::Shards, Source::Mtp]),
    (
        "gate_proj.weight",
        &[Source::Fp8, Source::Shards, Source::Demo],
    ),
    ("up_proj.weight", &[Source::Fp8, Source::V2, Source::Mtp]),
    (
        "down_proj.weight",
        &[Source::Fp8, Source::Shards, Source::Demo],
    ),
    ("shared_experts.", &[Source::Fp8, Source::V2]),
    ("_scale_inv", &[Source::Fp8]),
    ("eh_proj.weight", &[Source::Mtp, Source::Demo]),
];
/// Flips of one bit for each kind and source.
const FLIPS: usize = 2;

pub(crate) fn all(templates: &Templates) -> Vec<Case> {
    let draw = &mut Draw(7);
    let mut all = Vec::new();
    for (class, sources) in CLASSES {
        for &source in sources {
            let tensors = templates.tensors(source);
            let of_class: Vec<_> = tensors
                .into_iter()
                .filter(|t| t.name.contains(class))
                .collect();
            let flips = match class {
                "_scale_inv" | ".blob" => 4 * FLIPS,
                _ => FLIPS,
            };
            for _ in 0..flips {
                let tensor = draw_of(draw, &of_class);
                all.push(flipped(draw, source, tensor));
            }
        }
    }
    for source in Source::ALL {
        all.extend((0..4).map(|_| header_flip(draw, templates, source)));
        all.extend((0..3).map(|_| truncation(draw, templates, source)));
        all.extend(offsets(draw, templates, source));
        all.extend(kinds(draw, templates, source));
        all.extend(contents(draw, templates, source));
    }
    all.extend(packed());
    all.extend(shards());
    all.extend(small_files());
    all.extend(manifests());
    all
}

fn draw_of(draw: &mut Draw, tensors: &[Tensor]) -> Tensor {
    draw.of(tensors).clone()
}

/// Any tensor of a source that fits.
fn any(
    draw: &mut Draw,
    templates: &Templates,
    source: Source,
    fits: impl Fn(&Tensor) -> bool,
) -> Tensor {
    let tensors = templates.tensors(source);
    draw_of(draw, &tensors.into_iter().filter(fits).collect::<Vec<_>>())
}

fn flipped(draw: &mut Draw, source: Source, tensor: Tensor) -> Case {
    let (place, bit) = (draw.below(1 << 30), draw.below(8));
    let names = [tensor.file.as_str(), &format!("`{}`", tensor.name)];
    Case::new(
        format!("bit {bit} of a byte of {}", tensor.name),
        source,
        &names,
        {
            let (file, name) = (tensor.file.clone(), tensor.name.clone());
            move |dir| {
                edit_weights(&dir.join(&file), |weights| {
                    let bytes = weights.bytes(&name);
                    let at = place % bytes.len();
                    bytes[at] ^= 1 << bit;
                });
            }
        },
    )
}

/// A bit of a header, anywhere but in the free text of its metadata.
fn header_flip(draw: &mut Draw, templates: &Templates, source: Source) -> Case {
    let file = draw.of(&source.files()).clone();
    let bytes = fs::read(templates.dir(source).join(&file)).unwrap();
    let length = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let header = std::str::from_utf8(&bytes[8..8 + length]).unwrap();
    let free = header
        .find("__metadata__")
        .map_or(0, |at| at + header[at..].find('}').unwrap());
    let at = match draw.below(5) {
        0 => draw.below(8),
        _ => 8 + free + draw.below(length - free),
    };
    let bit = draw.below(8);
    Case::new(
        format!("bit {bit} of byte {at} of the header of {file}"),
        source,
        &[&file.clone()],
        move |dir| edit_bytes(&dir.join(&file), |bytes| bytes[at] ^= 1 << bit),
    )
}

fn truncation(draw: &mut Draw, templates: &Templates, source: Source) -> Case {
    let file = draw.of(&source.files()).clone();
    let size = fs::metadata(templates.dir(source).join(&file))
        .unwrap()
        .len() as usize;
    let to = match draw.below(4) {
        0 => draw.below(9),
        1 => size - 1 - draw.below(64),
        _ => draw.below(size),
    };
    Case::new(
        format!("{file} cut to {to} of {size} bytes"),
        source,
        &[&file.clone()],
        move |dir| edit_bytes(&dir.join(&file), |bytes| bytes.truncate(to)),
    )
}

/// An edit of the header of the file that holds a tensor; both are named.
fn header(
    what: &str,
    source: Source,
    tensor: &Tensor,
    edit: impl Fn(&mut Weights, &str) + Send + Sync + 'static,
) -> Case {
    let (file, name) = (tensor.file.clone(), tensor.name.clone());
    Case::new(
        format!("{what} of {name}"),
        source,
        &[&tensor.file, &format!("`{}`", tensor.name)],
        move |dir| edit_weights(&dir.join(&file), |weights| edit(weights, &name)),
    )
}

/// Places in the file that cannot be.
fn offsets(draw: &mut Draw, templates: &Templates, source: Source) -> Vec<Case> {
    let mut tensor = || any(draw, templates, source, |t| t.shape.len() == 2);
    let shifted = |by: i64| {
        move |weights: &mut Weights, name: &str| {
            let range = weights.range(name);
            let at = |n: usize| n as i64 + by;
            weights.set(
                name,
                "data_offsets",
                json!([at(range.start), at(range.end)]),
            );
        }
    };
    // Which of two that overlap is to blame depends on where they lie, so the file alone is named.
    let mut overlap = header("offsets one element back", source, &tensor(), shifted(-4));
    overlap.names.truncate(1);
    vec![
        overlap,
        header(
            "offsets beyond the end",
            source,
            &tensor(),
            shifted(1 << 40),
        ),
        header("offsets backwards", source, &tensor(), |weights, name| {
            let range = weights.range(name);
            weights.set(name, "data_offsets", json!([range.end, range.start]));
        }),
    ]
}

/// Element types and shapes that are not those of the model or the manifest.
fn kinds(draw: &mut Draw, templates: &Templates, source: Source) -> Vec<Case> {
    let as_dtype = |dtype: &'static str| {
        move |weights: &mut Weights, name: &str| weights.set(name, "dtype", json!(dtype))
    };
    // Of the same size, so that only the type is wrong: one that is served and one that is not.
    let other = |t: &Tensor| match t.dtype.as_str() {
        "BF16" => ("F16", "I16"),
        "F32" => ("I32", "U32"),
        "U8" => ("F8_E4M3", "I8"),
        _ => ("F8_E5M2", "I8"),
    };
    let one = any(draw, templates, source, |t| {
        t.shape.len() == 1 || t.dtype == "BF16"
    });
    let two = any(draw, templates, source, |t| t.name.contains("experts."));
    let long = any(draw, templates, source, |t| {
        t.shape.len() == 2 && t.shape[0] != t.shape[1]
    });
    vec![
        header("another dtype", source, &one, as_dtype(other(&one).0)),
        header("an integer dtype", source, &two, as_dtype(other(&two).1)),
        header("the shape turned", source, &long, |weights, name| {
            let shape = weights.header[name]["shape"].as_array_mut().unwrap();
            shape.reverse();
        }),
        header("the shape flat", source, &long, |weights, name| {
            let shape = &mut weights.header[name]["shape"];
            let product: u64 = shape
                .as_array()
                .unwrap()
                .iter()
                .filter_map(Value::as_u64)
                .product();
            *shape = json!([product]);
        }),
    ]
}

/// Sound files with other numbers in them.
fn contents(draw: &mut Draw, templates: &Templates, source: Source) -> Vec<Case> {
    let expert = any(draw, templates, source, |t| {
        t.name.contains(".mlp.experts.3.") && !t.name.ends_with("_inv")
    });
    let twin = expert.name.replace(".experts.3.", ".experts.5.");
    let gate = expert.name.replace("up_proj", "gate_proj");
    let attention = any(draw, templates, source, |t| t.name.contains("self_attn"));
    let norm = any(draw, templates, source, |t| t.name.contains("layernorm"));
    let nan = |weights: &mut Weights, name: &str| weights.bytes(name).fill(0xff);
    let held = |name: &str| {
        templates
            .tensors(source)
            .iter()
            .any(|t| t.name == name && t.file == expert.file)
    };
    let mut all = vec![
        header("NaN in all", source, &expert, nan),
        header("NaN in all", source, &attention, nan),
        header("zeros in all", source, &norm, |weights, name| {
            weights.bytes(name).fill(0);
        }),
    ];
    for other in [twin, gate] {
        if other == expert.name || !held(&other) {
            continue;
        }
        // Which of the two is read first is open.
        let mut case = header("the place", source, &expert, move |weights, name| {
            weights.exchange(name, &other);
        });
        case.names = vec![expert.file.clone(), "tensor `model.layers.".into()];
        all.push(case);
    }
    all
}

/// Packed checkpoints whose manifest lists just what is wrong.
fn packed() -> Vec<Case> {
    const TRUNK: &str = "model-00001-of-00002.safetensors";
    const EXPERTS: &str = "model-00002-of-00002.safetensors";
    const BLOB: &str = "model.layers.2.mlp.experts.7.blob";
    const SCALES: &str = "model.layers.0.self_attn.o_proj.weight_scale";
    let edited =
        |what: &str, file: &'static str, tensor: &'static str, says: &str, edit: fn(&mut [u8])| {
            let names = [file, &format!("`{tensor}`"), says];
            let what = format!("{what}, and listed so");
            let case = Case::new(what, Source::Packed, &names, move |dir| {
                edit_weights(&dir.join(file), |weights| edit(weights.bytes(tensor)));
                list(dir);
            });
            Case {
                listed: true,
                ..case
            }
        };
    let config = |what: &str, field: &str, edit: fn(&mut Value)| {
        let field = format!("quantization_config.{field}");
        Case::new(what, Source::Packed, &["config.json", &field], move |dir| {
            edit_json(&dir.join("config.json"), |config| {
                edit(&mut config["quantization_config"]);
            });
        })
    };
    vec![
        edited("a scale that is NaN", TRUNK, SCALES, "scale", |bytes| {
            bytes[2..4].copy_from_slice(&[0xc0, 0x7f]);
        }),
        edited(
            "a scale beyond all weights",
            TRUNK,
            SCALES,
            "scale",
            |bytes| {
                bytes[2..4].copy_from_slice(&[0x7f, 0x7f]);
            },
        ),
        edited("no blob", EXPERTS, BLOB, "GUILDEXP", |bytes| bytes[0] = 0),
        edited("another version", EXPERTS, BLOB, "version", |bytes| {
            bytes[8] = 2
        }),
        edited("another expert", EXPERTS, BLOB, "expert", |bytes| {
            bytes[28] = 6
        }),
        edited("another layer", EXPERTS, BLOB, "layer", |bytes| {
            bytes[24] = 3
        }),
        edited("int8 in its header", EXPERTS, BLOB, "gate", |bytes| {
            bytes[32] = 4
        }),
        edited("an unknown group", EXPERTS, BLOB, "gate", |bytes| {
            bytes[36] = 7
        }),
        edited("huge rows", EXPERTS, BLOB, "shapes", |bytes| {
            bytes[40..48].fill(0xff)
        }),
        edited("a length that lies", EXPERTS, BLOB, "length", |bytes| {
            bytes[17] ^= 1
        }),
        edited("its last scale infinite", EXPERTS, BLOB, "down", |bytes| {
            let last = u64::from_le_bytes(*bytes[32 + 2 * 72 + 56..].first_chunk().unwrap());
            bytes[last as usize..][..2].copy_from_slice(&[0x80, 0x7f]);
        }),
        config("another version of packing", "version", |q| {
            q["version"] = json!(2)
        }),
        config("no version", "version", |q| q["version"] = Value::Null),
        config("a group of 48", "group_size", |q| {
            q["group_size"] = json!(48)
        }),
        config("a group of all", "group_size", |q| {
            q["group_size"] = json!(u64::MAX)
        }),
        config("an unknown format", "formats.experts", |q| {
            q["formats"]["experts"] = json!("int3");
        }),
        config("an unknown role", "formats.router", |q| {
            q["formats"]["router"] = json!("int8");
        }),
        config("no formats", "formats", |q| q["formats"] = Value::Null),
        config("another method", "quant_method", |q| {
            q["quant_method"] = json!("gptq");
        }),
        Case::new(
            "the head is said to be plain",
            Source::Packed,
            &[TRUNK, "`lm_head.weight`"],
            |dir| {
                edit_json(&dir.join("config.json"), |config| {
                    let formats = config["quantization_config"]["formats"].as_object_mut();
                    formats.unwrap().shift_remove("head").unwrap();
                });
                fs::remove_file(dir.join(MANIFEST)).unwrap();
            },
        ),
        Case::new(
            "another group than the files have",
            Source::Packed,
            &[TRUNK, ".weight", "shape"],
            |dir| {
                edit_json(&dir.join("config.json"), |config| {
                    config["quantization_config"]["group_size"] = json!(128);
                });
                fs::remove_file(dir.join(MANIFEST)).unwrap();
            },
        ),
        Case::new(
            "a blob that is not there",
            Source::Packed,
            &[BLOB, "missing"],
            |dir| {
                edit_json(&dir.join(INDEX), |index| {
                    let map = index["weight_map"].as_object_mut().unwrap();
                    map.shift_remove(BLOB).unwrap();
                });
                fs::remove_file(dir.join(MANIFEST)).unwrap();
            },
        ),
    ]
}

/// Shards and the index that do not belong together.
fn shards() -> Vec<Case> {
    let mut all = Vec::new();
    for source in [Source::Shards, Source::Mtp] {
        let files = source.files();
        for other in &files[1..] {
            let (a, b) = (files[0].clone(), other.clone());
            all.push(Case::new(
                format!("{a} and {b} exchanged"),
                source,
                &[".safetensors", "tensor `"],
                move |dir| {
                    let [a, b, aside] = [&a, &b, &"aside".to_owned()].map(|n| dir.join(n));
                    fs::rename(&a, &aside).unwrap();
                    fs::rename(&b, &a).unwrap();
                    fs::rename(&aside, &b).unwrap();
                },
            ));
            let (a, b) = (files[0].clone(), other.clone());
            all.push(Case::new(
                format!("{b} is a copy of {a}"),
                source,
                &[".safetensors", "tensor `"],
                move |dir| {
                    fs::copy(dir.join(&a), dir.join(&b)).unwrap();
                },
            ));
        }
        let index = |what: &str, to: &'static str, names: &[&str]| {
            let tensor = "model.norm.weight";
            Case::new(format!("the index: {what}"), source, names, move |dir| {
                edit_json(&dir.join(INDEX), |index| {
                    let here = index["weight_map"][tensor].as_str().unwrap().to_owned();
                    let other = if here.contains("-00001-") {
                        "-00002-"
                    } else {
                        "-00001-"
                    };
                    let to = match to {
                        "" => here.replace(&here[5..12], other),
                        to => to.to_owned(),
                    };
                    index["weight_map"][tensor] = json!(to);
                });
            })
        };
        all.extend([
            index(
                "a tensor in another shard",
                "",
                &[".safetensors", "`model.norm.weight`"],
            ),
            index(
                "a shard that is not there",
                "nowhere.safetensors",
                &["nowhere.safetensors"],
            ),
            index(
                "a file outside",
                "../../etc/passwd",
                &[INDEX, "../../etc/passwd"],
            ),
            index("an absolute path", "/etc/passwd", &[INDEX, "/etc/passwd"]),
            index("not weights", "config.json", &["config.json"]),
        ]);
        all.push(Case::new(
            "the index: a tensor dropped",
            source,
            &["`model.norm.weight`"],
            |dir| {
                edit_json(&dir.join(INDEX), |index| {
                    let map = index["weight_map"].as_object_mut().unwrap();
                    map.shift_remove("model.norm.weight").unwrap();
                });
            },
        ));
    }
    all
}

/// The files beside the weights.
fn small_files() -> Vec<Case> {
    let config = |field: &'static str, value: Value| {
        Case::new(
            format!("config.json: {field} = {value}"),
            Source::Shards,
            &["config.json"],
            move |dir| {
                edit_json(&dir.join("config.json"), |config| {
                    config[field] = value.clone();
                });
            },
        )
    };
    let touched = |name: &'static str| {
        Case::new(
            format!("a space more in {name}"),
            Source::Demo,
            &[name],
            move |dir| {
                edit_bytes(&dir.join(name), |bytes| bytes.push(b' '));
            },
        )
    };
    vec![
        config("routed_scaling_factor", json!(2.25)),
        config("rope_theta", json!(20000)),
        config("rms_norm_eps", json!(1e-5)),
        config("norm_topk_prob", json!(false)),
        config("topk_group", json!(3)),
        config("num_experts_per_tok", json!(5)),
        config("eos_token_id", json!(2)),
        config("max_position_embeddings", json!(8192)),
        config("hidden_size", json!(128)),
        config("anything", json!("else")),
        touched("config.json"),
        touched("generation_config.json"),
        touched("tokenizer.json"),
        touched("tokenizer_config.json"),
        Case::new(
            "no tokenizer",
            Source::Demo,
            &["tokenizer.json", "missing"],
            |dir| {
                fs::remove_file(dir.join("tokenizer.json")).unwrap();
            },
        ),
        Case::new(
            "another chat template",
            Source::Demo,
            &["chat_template.jinja", "not listed"],
            |dir| fs::write(dir.join("chat_template.jinja"), "{{ messages }}").unwrap(),
        ),
    ]
}

/// Manifests that are not of this checkpoint, or none at all.
fn manifests() -> Vec<Case> {
    const NORM: &str = "model.norm.weight";
    let edited = |what: &str, names: &[&str], edit: fn(&mut Value)| {
        Case::new(
            format!("manifest: {what}"),
            Source::Fp8,
            names,
            move |dir| {
                edit_json(&dir.join(MANIFEST), edit);
            },
        )
    };
    let bytes = |what: &str, edit: fn(&mut Vec<u8>)| {
        Case::new(
            format!("manifest: {what}"),
            Source::Fp8,
            &[MANIFEST],
            move |dir| {
                edit_bytes(&dir.join(MANIFEST), edit);
            },
        )
    };
    vec![
        edited("another version", &[MANIFEST, "`version`"], |m| {
            m["version"] = json!(2);
        }),
        edited(
            "a digest that is no hex",
            &[MANIFEST, NORM, "blake3"],
            |m| {
                m["tensors"][NORM]["blake3"] = json!("xyz");
            },
        ),
        edited("another digest", &[".safetensors", NORM], |m| {
            m["tensors"][NORM]["blake3"] = json!("00".repeat(32));
        }),
        edited("another dtype", &[".safetensors", NORM, "dtype"], |m| {
            m["tensors"][NORM]["dtype"] = json!("F64");
        }),
        edited("another shape", &[".safetensors", NORM, "shape"], |m| {
            m["tensors"][NORM]["shape"] = json!([1]);
        }),
        edited("a tensor less", &[".safetensors", NORM, MANIFEST], |m| {
            m["tensors"].as_object_mut().unwrap().shift_remove(NORM);
        }),
        edited("a tensor more", &[MANIFEST, "`model.more.weight`"], |m| {
            m["tensors"]["model.more.weight"] = m["tensors"][NORM].clone();
        }),
        edited("a file outside", &[MANIFEST, "../keys"], |m| {
            m["files"]["../keys"] = json!("00".repeat(32));
        }),
        edited("another digest of config.json", &["config.json"], |m| {
            m["files"]["config.json"] = json!("00".repeat(32));
        }),
        edited("config.json not listed", &[MANIFEST, "config.json"], |m| {
            m["files"]
                .as_object_mut()
                .unwrap()
                .shift_remove("config.json");
        }),
        bytes("empty", Vec::clear),
        bytes("half", |bytes| bytes.truncate(bytes.len() / 2)),
        bytes("not text", |bytes| bytes[0] = 0xff),
        bytes("of another model", |bytes| {
            *bytes = fs::read(guild_tests::process::demo().join(MANIFEST)).unwrap();
        }),
    ]
}
