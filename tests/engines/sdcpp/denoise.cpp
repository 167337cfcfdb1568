// One call of stable-diffusion.cpp's Qwen-Image denoiser: denoise MODEL IN OUT [f32]
//
// IN holds the picture's latents, the time step (0 to 1000), the text's states, and the latents of input pictures, each
// as its number of dimensions, its dimensions (the fastest first; all int64), and its values (float32). OUT gets the
// answer's values. With `f32` all weights are widened to float32; without it they stay as the file has them.
#include <fstream>
#include <iostream>

#include "model.h"
#include "qwen_image.hpp"

static sd::Tensor<float> read_tensor(std::ifstream& file) {
    int64_t count = 0;
    file.read(reinterpret_cast<char*>(&count), sizeof(count));
    if (!file)
        return {};
    std::vector<int64_t> shape(count);
    file.read(reinterpret_cast<char*>(shape.data()), count * sizeof(int64_t));
    sd::Tensor<float> tensor(shape);
    file.read(reinterpret_cast<char*>(tensor.data()), tensor.numel() * sizeof(float));
    return tensor;
}

int main(int argc, char** argv) {
    sd_set_log_callback([](sd_log_level_t, const char* text, void*) { std::cerr << text; }, nullptr);
    if (argc < 4)
        return 2;
    std::ifstream input(argv[2], std::ios::binary);
    auto picture = read_tensor(input);
    auto step    = read_tensor(input);
    auto text    = read_tensor(input);
    std::vector<sd::Tensor<float>> references;
    for (auto next = read_tensor(input); !next.empty(); next = read_tensor(input))
        references.push_back(next);

    const std::string prefix = "model.diffusion_model";
    ModelLoader loader;
    if (!loader.init_from_file_and_convert_name(argv[1], prefix + "."))
        return 1;
    std::cerr << "version " << loader.get_sd_version() << (sd_version_is_qwen_image(loader.get_sd_version()) ? " is qwen_image\n" : "\n");
    auto& stored = loader.get_tensor_storage_map();
    if (argc > 4)
        for (auto& [name, tensor] : stored)
            tensor.expected_type = GGML_TYPE_F32;
    ggml_backend_t backend = ggml_backend_cpu_init();
    Qwen::QwenImageRunner runner(backend, false, stored, prefix, VERSION_QWEN_IMAGE);
    runner.alloc_params_buffer();
    std::map<std::string, ggml_tensor*> wanted;
    runner.get_param_tensors(wanted, prefix);
    if (!loader.load_tensors(wanted))
        return 1;
    auto answer = runner.compute(2, picture, step, text, references, true);
    std::ofstream output(argv[3], std::ios::binary);
    output.write(reinterpret_cast<const char*>(answer.data()), answer.numel() * sizeof(float));
    return output.good() && !answer.empty() ? 0 : 1;
}
