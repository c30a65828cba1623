// Random problems: a built library against the definition, tap by tap in double precision. Needs neither Python nor PyTorch, so
// it also runs where they do not, for instance in an emulator of another processor.
//
//     fuzz LIBRARY [problems=200] [seed=0] [isa=NAME] [openmp=FILE]
//
// Every instruction set of the library that the processor has, or the named one, computes the same problems. Problem i of seed s
// is problem 0 of seed s + i. The exit status is 1 if a result is wrong, and 2 if nothing could be tested.
#include "fuzz/depthwise_conv.hpp"
#include "fuzz/depthwise_tests.hpp"
#include "fuzz/pointwise.hpp"
#include "fuzz/response.hpp"
#include "fuzz/steps.hpp"
#include "fuzz/training.hpp"

namespace {

uint64_t number_of(const char *text) {
    char *end;
    const unsigned long long value = std::strtoull(text, &end, 10);
    if (!*text || *end || *text == '-') stop(2, "%s is not a number", text);
    return value;
}

}  // namespace

int main(int count, char **arguments) {
    if (count < 2) stop(2, "usage: fuzz LIBRARY [problems=200] [seed=0] [isa=NAME] [openmp=FILE]");
    open_library(arguments[1]);
    uint64_t problems = 200, seed = 0;
    const char *openmp = nullptr, *only = nullptr;
    for (int i = 2; i < count; i++) {
        const std::string option = arguments[i];
        const char *value = arguments[i] + std::min(option.find('=') + 1, option.size());
        if (option.rfind("problems=", 0) == 0)
            problems = number_of(value);
        else if (option.rfind("seed=", 0) == 0)
            seed = number_of(value);
        else if (option.rfind("isa=", 0) == 0)
            only = value;
        else if (option.rfind("openmp=", 0) == 0)
            openmp = value;
        else
            stop(2, "%s is not an option of this program", arguments[i]);
    }
    if (openmp && (!dlopen(openmp, RTLD_NOW) || !library.bind_openmp(openmp))) stop(2, "%s provides no threads", openmp);
    if (only && library.use_isa(only) != WK_OK) stop(2, "%s, or this processor, lacks %s", arguments[1], only);
    for (const char *isa : {"avx512", "avx2", "neon", "portable"}) {
        if ((only && std::strcmp(isa, only)) || library.use_isa(isa) != WK_OK) continue;
        for (int dtype : {WK_BFLOAT16, WK_FLOAT16})
            for (Layout layout : {CONTIGUOUS, CHANNELS_LAST}) test_conversions(dtype, layout);
        Judge judge;
        for (uint64_t i = 0; i < problems; i++) {
            Random random(seed + i);
            const Problem problem = drawn(random);
            test_sum(problem, seed + i, random, judge);
            if (i % 4 == 0) test_partial(problem, seed + i, random, judge);
            test_weight_grad(problem, seed + i, random, judge);
            test_branches(problem, seed + i, random, judge);
            test_pointwise(seed + i, random, judge);
            test_response(seed + i, random, judge);
            test_pointwise_grad(seed + i, random, judge);
            test_batch_norm(seed + i, random, judge);
            test_depthwise_conv(seed + i, random, judge);
            test_steps(seed + i, random);
        }
        std::printf("%s: %llu problems, largest error %.2f of what is allowed\n", isa, static_cast<unsigned long long>(problems),
                    judge.largest());
        std::fflush(stdout);
    }
    return 0;
}
